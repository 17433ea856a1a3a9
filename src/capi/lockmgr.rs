//! Lock managers.

use std::ffi::{c_char, c_int};

use super::guard::Fail;
use super::options::{options_arg, out_arg, text_arg};
use super::*;
use crate::lockmgr::Manager;

/// A lock manager that was loaded: a shared object that decides who may have an image open. What one
/// has to be is told in qblk-lockmgr.h.
pub struct qblk_lock_manager(Arc<Manager>);

/// Load the lock manager `path`, a shared object, for qblk_options_set_lock_manager().
///
/// `path` is as for dlopen(). The keys and values of `options` (NULL: none) are the manager's, for all
/// leases that it gives. (A manager can also be named at open, by the options "lock-manager" and
/// "lock-manager.KEY", or for the whole site by the environment: QBLK_LOCK_MANAGER.)
///
/// Returns 0 and the manager in `*out`, to be freed with qblk_lock_manager_free(). On failure `*out`
/// is NULL: -EINVAL for a NULL or an empty path, -ENOENT, -ELIBACC if it cannot be loaded,
/// -ELIBBAD if it lacks a function that every lock manager has. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_lock_manager_load(
    path: *const c_char,
    options: *const qblk_options,
    out: *mut *mut qblk_lock_manager,
) -> c_int {
    guard::call("qblk_lock_manager_load", || {
        // SAFETY: as the manual asks.
        let (out, path) = unsafe { (out_arg(out)?, text_arg(path, "the path is NULL")?) };
        guard::alive()?;
        // SAFETY: as the manual asks.
        let options = unsafe { options_arg(options) };
        let settings = options.with_prefix("").map(|(k, v)| (k.to_owned(), v.to_vec()));
        let manager = Manager::load(path.to_bytes(), settings.collect())?;
        tell::done("loaded the lock manager", tell::Name(path.to_bytes()), "");
        *out = Box::into_raw(Box::new(qblk_lock_manager(manager)));
        Ok(())
    })
}

/// Use `mgr` for what is opened or created with these options; NULL: none, not even the site's.
///
/// The options "lock-owner", "lock-owner-uuid" and "lock-wait" say for whom, and how long to wait. The
/// manager must not be freed before the last open (or reopen) with these options; what is open then
/// keeps it.
///
/// Returns 0; -EINVAL if `o` is NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_options_set_lock_manager(
    o: *mut qblk_options,
    mgr: *mut qblk_lock_manager,
) -> c_int {
    guard::call("qblk_options_set_lock_manager", || {
        // SAFETY: NULL or options, as the manual asks.
        let options = unsafe { o.as_ref() }.ok_or(Fail::Argument("the options are NULL"))?;
        // SAFETY: NULL or a manager, as the manual asks.
        let name = unsafe { mgr.as_ref() }.map_or(String::new(), |m| m.0.option());
        guard::alive()?;
        options.0.lock().set("lock-manager", Some(name.as_bytes()));
        Ok(())
    })
}

/// Free a lock manager; NULL does nothing. Devices that it has leased keep it until they are closed.
///
/// Cannot fail. Any thread, also in a child of fork, as the last call on it. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_lock_manager_free(mgr: *mut qblk_lock_manager) {
    if mgr.is_null() {
        return;
    }
    // SAFETY: made by qblk_lock_manager_load, and this is the last use, as the manual asks.
    let manager = unsafe { Box::from_raw(mgr) };
    if guard::forked() {
        // Its destructor might wait for threads that are not here.
        std::mem::forget(manager);
    }
}
