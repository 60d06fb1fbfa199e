//! The CUDA driver: whether it is there, and which devices it has.

use super::CudaError;
use cudarc::driver::DriverError;
use cudarc::driver::result::{self, device};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

/// What the driver says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The CUDA that it knows: major and minor version.
    pub version: (u32, u32),
    /// Its devices, by their number; at least one.
    pub devices: Vec<Device>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// As its maker calls it.
    pub name: String,
    /// Ten times its compute capability: 90 is 9.0.
    pub capability: u32,
    /// Bytes of its memory.
    pub memory_bytes: u64,
}

impl Driver {
    /// A device by its number.
    ///
    /// # Errors
    /// If there is none: with those that there are.
    pub fn device(&self, number: u32) -> Result<&Device, CudaError> {
        self.devices.get(number as usize).ok_or_else(|| {
            let devices =
                (0..).zip(&self.devices).map(|(number, device)| format!("{number} ({})", device.name));
            CudaError::OtherDevice { number, devices: devices.collect::<Vec<_>>().join(", ") }
        })
    }
}

/// Asks the driver.
///
/// # Errors
/// If there is none, it fails, or it has no device.
pub fn find() -> Result<Driver, CudaError> {
    // SAFETY: opening the library runs what it does when it is loaded, and that is the driver of this machine.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    result::init().map_err(refusal("cuInit"))?;
    let mut version = 0;
    // SAFETY: it writes one integer, which lives until the call returns.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(refusal("cuDriverGetVersion"))?;
    let version = version.unsigned_abs();
    let count = device::get_count().map_err(refusal("cuDeviceGetCount"))?;
    let devices = (0..count).map(look).collect::<Result<Vec<_>, _>>()?;
    if devices.is_empty() {
        return Err(CudaError::NoDevice);
    }
    Ok(Driver { version: (version / 1000, version % 1000 / 10), devices })
}

fn look(number: i32) -> Result<Device, CudaError> {
    let handle = device::get(number).map_err(refusal("cuDeviceGet"))?;
    let name = device::get_name(handle).map_err(refusal("cuDeviceGetName"))?;
    let attribute = |attribute| {
        // SAFETY: the handle is the driver's own.
        let value = unsafe { device::get_attribute(handle, attribute) };
        value.map(i32::unsigned_abs).map_err(refusal("cuDeviceGetAttribute"))
    };
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: the handle is the driver's own.
    let memory = unsafe { device::total_mem(handle) }.map_err(refusal("cuDeviceTotalMem"))?;
    Ok(Device { name, capability: major * 10 + minor, memory_bytes: memory as u64 })
}

/// What an error of a call means.
pub(super) fn refusal(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| {
        if error.0 == CUresult::CUDA_ERROR_NO_DEVICE {
            return CudaError::NoDevice;
        }
        let words = error.error_string().map(|words| words.to_string_lossy().into_owned());
        CudaError::Driver { call, why: words.unwrap_or_else(|_| format!("{:?}", error.0)) }
    }
}
