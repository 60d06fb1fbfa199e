//! Shared pieces of the fuzz targets.
