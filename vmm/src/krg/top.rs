//! `krg top`: on a terminal until q, or one picture.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use krg_vmm::cluster::errno;
use krg_vmm::cluster::status::Status;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal;
use serde_json::json;
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::client::Client;
use crate::model::Model;
use crate::{Said, Trouble, commands, frame};

/// How often the machine is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a key or a signal may take to be seen.
const TICK: Duration = Duration::from_millis(100);
/// Two tellings of every node should have come by then.
const PATIENCE: Duration = Duration::from_secs(12);

/// Whether there is a terminal to watch on.
///
/// # Errors
/// There is none, or JSON was asked for.
pub fn possible(json: bool) -> Result<(), Trouble> {
    if json {
        return Err(Trouble::Usage("--json is for one picture: krg top --once --json".into()));
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Trouble::Usage("ENOTTY: krg top needs a terminal; for one picture as text: krg top --once".into()));
    }
    Ok(())
}

/// One picture, with rates if the nodes tell their figures often enough.
///
/// # Errors
/// When the machine ends before.
pub fn once(mut client: Client) -> Result<Said, Trouble> {
    let until = Instant::now() + PATIENCE;
    let mut model = Model::default();
    loop {
        let status = commands::status(&mut client)?;
        model.update(Status::read(&status));
        if model.complete() || Instant::now() >= until {
            let width = io::stdout().is_terminal().then(|| terminal::size().ok()).flatten();
            let text = frame::text(&model, width.map(|(width, _)| width));
            return Ok(Said { text, json: json!({"ok": true, "status": status}) });
        }
        thread::sleep(TICK);
    }
}

/// The terminal while it is ours: dropping this gives it back as it was. A panic does, too.
struct Screen(ratatui::DefaultTerminal);

impl Screen {
    fn take() -> Result<Self, Trouble> {
        let terminal = ratatui::try_init().inspect_err(|_| ratatui::restore());
        terminal.map(Self).map_err(|error| failed(&error))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Shows the machine until q is typed.
///
/// # Errors
/// When the machine ends.
pub fn watch(mut client: Client) -> Result<Said, Trouble> {
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        signal_hook::flag::register_usize(number, signal.clone(), number as usize).map_err(|error| failed(&error))?;
    }
    let mut model = Model::default();
    model.update(Status::read(&commands::status(&mut client)?));
    // An answer may take its time; keys do not wait for it.
    let (asked, answers) = channel();
    let ask = move || {
        loop {
            thread::sleep(INTERVAL);
            let answer = commands::status(&mut client);
            let over = answer.is_err();
            if asked.send(answer).is_err() || over {
                return;
            }
        }
    };
    thread::Builder::new().name("ask".into()).spawn(ask).map_err(|error| failed(&error))?;
    let mut screen = Screen::take()?;
    let mut first = 0usize;
    let caught = loop {
        match answers.try_recv() {
            Ok(answer) => model.update(Status::read(&answer?)),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Err(Trouble::System("internal error: nobody asks any more".into())),
        }
        first = first.min(model.now.vcpus.len().saturating_sub(1));
        screen
            .0
            .draw(|frame| frame::draw(&model, first, frame.area(), frame.buffer_mut()))
            .map_err(|error| failed(&error))?;
        let caught = signal.load(Ordering::SeqCst);
        if caught != 0 {
            break Some(caught as i32);
        }
        match event::poll(TICK) {
            Ok(false) => continue,
            // A signal, which the next round sees.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(&error)),
            Ok(true) => {}
        }
        if let Event::Key(key) = event::read().map_err(|error| failed(&error))? {
            match key.code {
                _ if key.kind == KeyEventKind::Release => {}
                KeyCode::Char('q' | 'Q') | KeyCode::Esc => break None,
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => break None,
                KeyCode::Up => first = first.saturating_sub(1),
                KeyCode::Down => first += 1,
                KeyCode::PageUp => first = first.saturating_sub(10),
                KeyCode::PageDown => first += 10,
                KeyCode::Home => first = 0,
                _ => {}
            }
        }
    };
    drop(screen);
    if let Some(signal) = caught {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
    Ok(Said { text: String::new(), json: json!({"ok": true}) })
}

fn failed(error: &io::Error) -> Trouble {
    Trouble::System(format!("terminal: {}", errno::describe(error)))
}
