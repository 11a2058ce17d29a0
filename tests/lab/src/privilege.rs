//! The privilege needed to create network namespaces.

use std::fs;
use std::io;
use std::process::Command;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getgid, getuid};

/// How this process obtained the right to create network namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// The process had CAP_SYS_ADMIN.
    Root,
    /// The process is root in a user namespace of its own.
    User,
}

/// Why the lab cannot run on this machine.
#[derive(Debug, thiserror::Error)]
pub enum LabUnavailable {
    /// Neither root nor user namespaces are available.
    #[error("creating network namespaces: {0}{REMEDY}")]
    Namespaces(Errno),
    /// The program `ip` is missing.
    #[error("running ip: {0} (install iproute2)")]
    Ip(io::Error),
    /// The user and group could not be mapped in the user namespace.
    #[error("mapping root in a new user namespace: {0}{REMEDY}")]
    Identity(io::Error),
}

const REMEDY: &str = " (run as root, or allow user namespaces: sysctl kernel.unprivileged_userns_clone=1, and on Ubuntu \
                      kernel.apparmor_restrict_unprivileged_userns=0)";

/// If set to `user`, root uses a user namespace as other users do.
const FORCE_VARIABLE: &str = "PATHMETER_LAB_NAMESPACE";

/// Moves this process into a network namespace of its own, with all privileges there. Must be called first in
/// `main`: a process with more than one thread cannot enter a user namespace.
///
/// # Errors
/// [`LabUnavailable`], with the remedy.
pub fn enter() -> Result<Privilege, LabUnavailable> {
    Command::new("ip").arg("-Version").output().map_err(LabUnavailable::Ip)?;
    let is_forced = std::env::var_os(FORCE_VARIABLE).is_some_and(|kind| kind == "user");
    if !is_forced && unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        return Ok(Privilege::Root);
    }
    let (user, group) = (getuid(), getgid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(LabUnavailable::Namespaces)?;
    let identity = || -> io::Result<()> {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))
    };
    identity().map_err(LabUnavailable::Identity)?;
    Ok(Privilege::User)
}

/// Drops CAP_NET_RAW from this thread and from threads that it starts later, so that they cannot open raw
/// sockets.
///
/// # Panics
/// When the kernel refuses.
#[expect(unsafe_code, reason = "capabilities of a single thread have no safe wrapper")]
pub fn drop_net_raw() {
    // linux/capability.h.
    const VERSION_3: u32 = 0x2008_0522;
    const NET_RAW: u32 = 13;
    let mut header = [VERSION_3, 0];
    // Effective, permitted and inheritable: the lower half of each, then the upper.
    let mut sets = [0_u32; 6];
    // SAFETY: both arrays have the lengths of capability version 3.
    let read = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    for set in &mut sets[..3] {
        *set &= !(1 << NET_RAW);
    }
    // SAFETY: as above.
    let written = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) };
    assert_eq!((read, written), (0, 0), "dropping CAP_NET_RAW: {}", io::Error::last_os_error());
}
