//! A panic inside a run is a finding, with the place where it happened; it is not printed.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static FOUND: RefCell<Option<Option<String>>> = const { RefCell::new(None) };
}

static HOOK: Once = Once::new();

/// Runs something; its panic, if it has one.
pub(super) fn caught<R>(act: impl FnOnce() -> R) -> Result<R, String> {
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let quiet = FOUND.with_borrow_mut(|found| {
                let Some(found) = found else { return false };
                let place =
                    info.location().map_or_else(String::new, |at| format!(" ({}:{})", at.file(), at.line()));
                let payload = info.payload();
                let words = payload.downcast_ref::<&str>().map(ToString::to_string);
                let words = words.or_else(|| payload.downcast_ref::<String>().cloned());
                *found = Some(words.unwrap_or_default() + &place);
                true
            });
            if !quiet {
                before(info);
            }
        }));
    });
    FOUND.set(Some(None));
    let result = panic::catch_unwind(AssertUnwindSafe(act));
    let found = FOUND.take().flatten();
    result.map_err(|_| found.unwrap_or_default())
}
