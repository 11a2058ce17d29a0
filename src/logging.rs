//! The log: lines on stderr, for a terminal, the journal or a log collector.
//!
//! Lines are written synchronously, so a blocked stderr blocks the caller. The measuring threads therefore
//! never log: they report events, and a tokio thread logs them.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::format::{self, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, reload};

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Text: with colours on a terminal. In the journal without a time, because the journal adds its own, and
    /// with the priority that `journalctl -p` selects by.
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts the log of this process.
///
/// `level` is a level (`off`, `error`, `warn`, `info`, `debug`, `trace`) or a filter by module
/// (`warn,pathmeter::http=debug`). It comes from `--log-level` or the configuration; `RUST_LOG` is not read.
///
/// # Errors
/// [`LogError`].
pub fn init(level: &str, format: Format) -> Result<LogHandle, LogError> {
    let (subscriber, handle) = subscriber(level, Style::of_stderr(format), io::stderr)?;
    subscriber.try_init().map_err(|_| LogError::Started)?;
    Ok(handle)
}

/// A handle that changes the log level at run time.
#[derive(Debug, Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl LogHandle {
    /// Sets the level or filter; `level` has the syntax of [`init`].
    ///
    /// # Errors
    /// [`LogError::Level`] or [`LogError::Filter`]; the log level is then unchanged.
    pub fn set_level(&self, level: &str) -> Result<(), LogError> {
        let filter = filter(level)?;
        self.filter.reload(filter).map_err(|_| LogError::Gone)
    }
}

/// An error in starting or changing the log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// An unknown level.
    #[error(
        "unknown log level `{found}` (use off, error, warn, info, debug or trace, or a filter such as \
         `warn,pathmeter::http=debug`)"
    )]
    Level {
        /// The level as it was given.
        found: String,
    },
    /// A filter that cannot be parsed.
    #[error("log filter `{found}`: {source}")]
    Filter {
        /// The filter as it was given.
        found: String,
        /// The cause.
        source: ParseError,
    },
    /// The process already has a log.
    #[error("the log is already started")]
    Started,
    /// The log of this handle is closed.
    #[error("the log is closed")]
    Gone,
}

/// The style of lines: the format, and the kind of destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Terminal,
    Journal,
    Plain,
    Json,
}

impl Style {
    fn of_stderr(format: Format) -> Self {
        match format {
            Format::Json => Self::Json,
            Format::Text if is_journal(std::env::var("JOURNAL_STREAM").ok().as_deref()) => Self::Journal,
            Format::Text if io::stderr().is_terminal() && !is_no_color_set() => Self::Terminal,
            Format::Text => Self::Plain,
        }
    }
}

/// Whether stderr is the stream that `JOURNAL_STREAM` names by device and inode. The variable alone proves
/// nothing: child processes inherit it, whatever their stderr is (systemd.exec(5)).
fn is_journal(stream: Option<&str>) -> bool {
    let stderr_stream = || {
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned().ok()?).metadata().ok()?;
        Some(format!("{}:{}", stderr.dev(), stderr.ino()))
    };
    stream.is_some_and(|stream| stderr_stream().is_some_and(|stderr_stream| stderr_stream == stream))
}

/// Whether `NO_COLOR` is present and not empty (<https://no-color.org>).
fn is_no_color_set() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

fn subscriber<W>(
    level: &str,
    style: Style,
    writer: W,
) -> Result<(impl Subscriber + Send + Sync + 'static, LogHandle), LogError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(style == Style::Terminal);
    let lines = match style {
        Style::Terminal | Style::Plain => lines.boxed(),
        Style::Journal => lines.event_format(Prioritised(format::format().without_time())).boxed(),
        Style::Json => lines.json().with_current_span(false).with_span_list(false).boxed(),
    };
    Ok((tracing_subscriber::registry().with(filter).with(lines), LogHandle { filter: handle }))
}

/// Directives without `=`, `[` or `{` must be levels: the filter would take a misspelt level for the name of
/// a module.
fn filter(level: &str) -> Result<EnvFilter, LogError> {
    for word in level.split(',').map(str::trim) {
        if !word.contains(['=', '[', ']', '{', '}'])
            && (word.is_empty() || word.parse::<LevelFilter>().is_err())
        {
            return Err(LogError::Level { found: word.to_owned() });
        }
    }
    let filter = EnvFilter::builder().with_regex(false).parse(level);
    filter.map_err(|source| LogError::Filter { found: level.to_owned(), source })
}

/// Prefixes lines with their priority (sd-daemon(3)).
struct Prioritised<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritised<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'w> FormatFields<'w> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};
    use tracing::{debug, info, warn};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: &str, style: Style, act: impl FnOnce(&LogHandle)) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let (subscriber, handle) = subscriber(level, style, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || act(&handle));
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn plain_line_has_a_time_and_no_colour() {
        let text = logged("info", Style::Plain, |_| info!(peer = "ams-1", "loss began"));
        assert!(text.ends_with("Z  INFO pathmeter::logging::tests: loss began peer=\"ams-1\"\n"), "{text:?}");
    }

    #[test]
    fn terminal_line_has_colour() {
        assert!(logged("info", Style::Terminal, |_| info!("loss began")).contains("\u{1b}["));
    }

    #[test]
    fn journal_line_has_a_priority_and_no_time() {
        let text = logged("debug", Style::Journal, |_| {
            warn!("odd");
            debug!("detail");
        });
        assert_eq!(
            text,
            "<4> WARN pathmeter::logging::tests: odd\n<7>DEBUG pathmeter::logging::tests: detail\n"
        );
    }

    #[test]
    fn json_line_is_one_object_for_any_field_value() {
        let text = logged("info", Style::Json, |_| info!(peer = "a\"\n\u{1b}[31m", "loss began"));
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["fields"]["message"], "loss began");
        assert_eq!(line["fields"]["peer"], "a\"\n\u{1b}[31m");
    }

    #[test]
    fn valid_level_applies_at_once_and_an_invalid_one_changes_nothing() {
        let text = logged("warn", Style::Journal, |handle| {
            info!("one");
            handle.set_level("warn,pathmeter::logging=info").unwrap();
            info!("two");
            assert!(handle.set_level("loud").is_err());
            info!("three");
            handle.set_level("off").unwrap();
            warn!("four");
        });
        assert_eq!(
            text,
            "<6> INFO pathmeter::logging::tests: two\n<6> INFO pathmeter::logging::tests: three\n"
        );
    }

    #[test]
    fn misspelt_level_is_not_a_module_filter() {
        for level in ["", "infoo", "info,", "warn,pathmeter"] {
            assert!(matches!(filter(level), Err(LogError::Level { .. })), "{level}");
        }
        assert!(matches!(filter("pathmeter=loud"), Err(LogError::Filter { .. })));
        for level in ["info", "OFF", "warn,pathmeter::http=debug", "info,[scrape{peer=ams-1}]=trace"] {
            assert!(filter(level).is_ok(), "{level}");
        }
    }

    #[test]
    fn journal_is_detected_by_the_stream_and_not_by_the_variable_alone() {
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned().unwrap()).metadata().unwrap();
        assert!(is_journal(Some(&format!("{}:{}", stderr.dev(), stderr.ino()))));
        assert!(!is_journal(Some("0:0")));
        assert!(!is_journal(None));
    }
}
