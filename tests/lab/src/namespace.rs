//! A network namespace that has no name in the file system.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{self, Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace. The kernel removes it when this value and all programs in it are gone.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: OwnedFd,
}

/// Defaults for interfaces created later: no router solicitation, no duplicate address detection, no
/// generated addresses.
const QUIET: [(&str, &str); 5] = [
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/addr_gen_mode", "1"),
    ("ipv6/conf/default/router_solicitations", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
];

impl Namespace {
    /// Creates a namespace with only a loopback interface. `name` is shown in error messages and thread
    /// names.
    ///
    /// # Panics
    /// When this process may not create network namespaces.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("the lab was entered, so it may make namespaces");
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        let file = thread::scope(|scope| scope.spawn(make).join().unwrap());
        let namespace = Self { name: name.to_owned(), file: file.into() };
        for (key, value) in QUIET {
            namespace.set_sysctl(key, value);
        }
        namespace.ip("link set lo up");
        namespace
    }

    /// Path by which other programs can open the namespace while this process runs.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd())
    }

    /// Runs `work` on a thread in this namespace and waits for it. Sockets that it opens belong to the
    /// namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let enter_and_work = || {
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        thread::scope(|scope| {
            let worker = thread::Builder::new().name(self.name.clone()).spawn_scoped(scope, enter_and_work);
            worker.unwrap().join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread in this namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let file = self.file.try_clone().unwrap();
        let enter_and_work = move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        thread::Builder::new().name(self.name.clone()).spawn(enter_and_work).unwrap()
    }

    /// A command that runs in this namespace. The kernel kills the program when the thread that started it
    /// ends.
    #[must_use]
    #[expect(unsafe_code, reason = "the child enters the namespace between fork and exec")]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let file = self.file.try_clone().unwrap();
        let parent = i32::try_from(process::id()).unwrap();
        let enter = move || {
            // SAFETY: system calls that are safe after fork, on a descriptor that this closure owns.
            let (entered, bound, parent_now) = unsafe {
                (
                    libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET),
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL),
                    libc::getppid(),
                )
            };
            match (entered, bound) {
                // A parent that exited before the prctl call causes no signal.
                (0, 0) if parent_now != parent => Err(std::io::ErrorKind::BrokenPipe.into()),
                (0, 0) => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: see above; nothing is allocated and no lock is taken.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs `ip -batch` with one command per line.
    ///
    /// # Panics
    /// When a command fails, with the error output of `ip`.
    pub fn ip(&self, lines: &str) {
        self.run("ip", &["-batch", "-"], lines, "Debian: iproute2");
    }

    /// Adds rules to the netfilter of this namespace, in the format of `nft -f`.
    ///
    /// # Panics
    /// When a rule is refused, with the error output of `nft`.
    pub fn nft(&self, rules: &str) {
        self.run("nft", &["-f", "-"], rules, "Debian: nftables");
    }

    fn run(&self, program: &str, arguments: &[&str], input: &str, package: &str) {
        let mut command = self.command(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{program}: {error} ({package})"));
        child.stdin.take().expect("it is piped").write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} in {}: {stderr}\n{input}", self.name);
    }

    /// Sets a key below `/proc/sys/net`. Keys that this kernel does not have are ignored.
    ///
    /// # Panics
    /// When the kernel refuses the value.
    pub fn set_sysctl(&self, key: &str, value: &str) {
        let file = format!("/proc/sys/net/{key}");
        let written = self.within(|| fs::write(&file, value));
        match written {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{file} = {value}: {error}"),
            Ok(()) | Err(_) => {}
        }
    }
}
