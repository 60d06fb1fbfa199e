//! What a run did and how fast, measured and held against what the machine could do.

pub(crate) mod course;
pub(crate) mod figures;
pub(crate) mod hits;
pub(crate) mod optimum;
pub(crate) mod picture;
pub(crate) mod roof;
