//! Times gathered, and figures as people and machines read them.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::json;

/// Times of one kind of event, in nanoseconds.
pub struct Times(Histogram<u64>);

impl Times {
    pub fn new() -> Self {
        // 1 ns to 100 s; three digits are more than the noise leaves.
        Times(Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("possible bounds and digits"))
    }

    /// Adds a time in microseconds.
    pub fn add(&mut self, us: f64) {
        self.0.saturating_record((us * 1000.0) as u64);
    }

    /// Adds a time.
    pub fn took(&mut self, time: Duration) {
        self.add(time.as_secs_f64() * 1e6);
    }

    pub fn mean(&self) -> f64 {
        self.0.mean() / 1000.0
    }

    /// Mean, median and 99th percentile in microseconds.
    pub fn three(&self) -> [f64; 3] {
        let quantile = |q| self.0.value_at_quantile(q) as f64 / 1000.0;
        [self.mean(), quantile(0.5), quantile(0.99)]
    }
}

/// What a figure is compared with.
#[derive(Clone, Copy)]
pub enum Beside {
    /// Measured in the same run.
    Floor(f64),
    /// Published by others.
    Rival(f64),
    Nothing,
}

pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    pub beside: Beside,
}

/// All figures of a run, printed as they come.
pub struct Figures {
    json: bool,
}

impl Figures {
    pub fn new(json: bool) -> Self {
        Figures { json }
    }

    /// A heading, for people.
    pub fn section(&self, text: &str) {
        if !self.json {
            println!("\n{text}");
        }
    }

    pub fn put(&self, figure: Figure) {
        let Figure {
            name,
            value,
            unit,
            beside,
        } = figure;
        let (word, other) = match beside {
            Beside::Floor(floor) => ("floor", floor),
            Beside::Rival(rival) => ("rival", rival),
            Beside::Nothing => ("", 0.0),
        };
        if self.json {
            let mut line = json!({"name": name, "value": rounded(value), "unit": unit});
            if !word.is_empty() {
                line[word] = json!(rounded(other));
                line["ratio"] = json!(rounded(value / other));
            }
            println!("{line}");
        } else if word.is_empty() {
            println!("  {name:44} {value:10.2} {unit}");
        } else {
            println!(
                "  {name:44} {value:10.2} {unit:8} {word} {other:10.2}  ratio {:.2}",
                value / other
            );
        }
    }

    pub fn plain(&self, name: &str, value: f64, unit: &'static str) {
        self.put(Figure {
            name: name.into(),
            value,
            unit,
            beside: Beside::Nothing,
        });
    }

    pub fn floor(&self, name: &str, value: f64, unit: &'static str, floor: f64) {
        self.put(Figure {
            name: name.into(),
            value,
            unit,
            beside: Beside::Floor(floor),
        });
    }

    /// Mean, median and 99th percentile beside those of the floor.
    pub fn times(&self, name: &str, times: &Times, floor: Option<[f64; 3]>) {
        for (n, part) in ["mean", "p50", "p99"].into_iter().enumerate() {
            let beside = floor.map_or(Beside::Nothing, |floor| Beside::Floor(floor[n]));
            self.put(Figure {
                name: format!("{name}, {part}"),
                value: times.three()[n],
                unit: "us",
                beside,
            });
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
