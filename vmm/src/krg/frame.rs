//! One picture of `krg top`.

use krg_vmm::cluster::status::Told;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Row, Table, Widget};

use crate::model::{Contended, Model};
use crate::show::{UNKNOWN, bytes, hex, or_unknown, ranges, rate, vcpu_row};

const KEYS: &str = "q quits; up, down, page up and page down: other vCPUs";
/// Columns of a picture that goes to no terminal.
const WIDTH: u16 = 120;

/// The rows of the three tables that have room, each with its head.
#[derive(Debug, PartialEq, Eq)]
struct Heights {
    nodes: u16,
    vcpus: u16,
    pages: u16,
}

/// Shares `height` lines out: what everything needs, or a third each of what there is.
fn share(height: u16, nodes: usize, vcpus: usize, pages: usize) -> Heights {
    let wanted = |rows: usize| u16::try_from(rows + 1).unwrap_or(u16::MAX);
    let (nodes, vcpus, pages) = (wanted(nodes), wanted(vcpus), wanted(pages));
    let third = height / 3;
    let mut shared = Heights { nodes: nodes.min(third), vcpus: vcpus.min(third), pages: pages.min(third) };
    let mut left = height.saturating_sub(shared.nodes + shared.vcpus + shared.pages);
    for (part, wanted) in [(&mut shared.nodes, nodes), (&mut shared.vcpus, vcpus), (&mut shared.pages, pages)] {
        let more = (wanted - *part).min(left);
        *part += more;
        left -= more;
    }
    shared
}

/// Draws the machine; the vCPUs from number `first` on.
pub fn draw(model: &Model, first: usize, area: Rect, buffer: &mut Buffer) {
    let status = &model.now;
    let pages = model.contended();
    let first = first.min(status.vcpus.len().saturating_sub(1));
    let vcpus = vcpu_rows(model, first);
    // The title, a line between tables, and the keys.
    let heights = share(area.height.saturating_sub(4), status.nodes.len(), vcpus.len(), pages.len());
    let title = format!(
        "{}: {} vCPUs, {} on {} nodes; policy {}, {} moves, {} failed",
        status.name,
        status.cpus,
        bytes(status.memory),
        status.nodes.iter().filter(|node| node.online).count(),
        status.policy.as_deref().unwrap_or(UNKNOWN),
        or_unknown(status.moves, |moves| moves.to_string()),
        or_unknown(status.failures, |failures| failures.to_string())
    );
    let mut y = area.y;
    let mut place = |height: u16| {
        let place = Rect { x: area.x, y, width: area.width, height: height.min(area.bottom().saturating_sub(y)) };
        y = y.saturating_add(height).min(area.bottom());
        place
    };
    Line::styled(title, Modifier::BOLD).render(place(1), buffer);
    table(node_rows(model), &NODES).render(place(heights.nodes), buffer);
    place(1);
    table(vcpus, &VCPUS).render(place(heights.vcpus), buffer);
    place(1);
    table(page_rows(&pages), &PAGES).render(place(heights.pages), buffer);
    if area.height > 1 {
        let last = Rect { y: area.bottom() - 1, height: 1, ..area };
        Line::styled(KEYS, Modifier::DIM).render(last, buffer);
    }
}

/// The whole machine as lines of text.
pub fn text(model: &Model, width: Option<u16>) -> String {
    let pages = model.contended().len();
    let lines = 1 + model.now.nodes.len() + 2 + model.now.vcpus.len() + 2 + pages + 1 + 1;
    let width = width.unwrap_or(WIDTH);
    // A buffer has at most 65,535 cells.
    let most = usize::from(u16::MAX / width.max(1));
    let area = Rect { x: 0, y: 0, width, height: lines.min(most) as u16 };
    let mut buffer = Buffer::empty(area);
    draw(model, 0, area, &mut buffer);
    let line = |y| (0..area.width).filter_map(|x| Some(buffer.cell((x, y))?.symbol())).collect::<String>();
    // Without the keys, that nobody can press.
    let mut text: Vec<String> = (0..area.height.saturating_sub(1)).map(|y| line(y).trim_end().to_owned()).collect();
    while text.last().is_some_and(String::is_empty) {
        text.pop();
    }
    text.join("\n") + "\n"
}

/// A column: its head, and its width; the last is as wide as it can be.
type Column = (&'static str, u16);

const NODES: [Column; 11] = [
    ("NODE", 4),
    ("HOST", 21),
    ("VCPUS", 9),
    ("LOAD", 5),
    ("FAULTS/S", 8),
    ("US/FAULT", 8),
    ("IN/S", 6),
    ("OUT/S", 6),
    ("SENT/S", 9),
    ("COPIES", 9),
    ("BOUNCES/S", 9),
];

const VCPUS: [Column; 10] = [
    ("VCPU", 4),
    ("STATE", 8),
    ("NODE", 4),
    ("RAN", 4),
    ("WAITED", 6),
    ("STALLED", 7),
    ("FAULTS/S", 8),
    ("PIN", 4),
    ("MIGRATE", 7),
    ("WHY", 9),
];

const PAGES: [Column; 5] = [("PAGE", 14), ("FAULTS/S", 8), ("BOUNCES/S", 9), ("BOUNCES", 8), ("WHO (FAULTS)", 12)];

fn table<const N: usize>(rows: Vec<[String; N]>, columns: &'static [Column; N]) -> Table<'static> {
    let widths = columns.iter().enumerate().map(|(number, (_, width))| match number {
        last if last + 1 == N => Constraint::Min(*width),
        _ => Constraint::Length(*width),
    });
    let head = Row::new(columns.map(|(head, _)| head)).style(Style::new().add_modifier(Modifier::REVERSED));
    Table::new(rows.into_iter().map(Row::new), widths).header(head)
}

fn node_rows(model: &Model) -> Vec<[String; 11]> {
    let row = |(number, node): (usize, &krg_vmm::cluster::status::Node)| {
        let per_second = |of: fn(&Told) -> Option<u64>| or_unknown(model.rate(number, of), rate);
        let told = node.told.as_ref();
        let sent = model.rate(number, |told| told.bytes_out);
        if !node.online {
            let mut row = std::array::from_fn(|_| UNKNOWN.to_owned());
            (row[0], row[1], row[2]) = (number.to_string(), node.host.clone(), "offline".into());
            return row;
        }
        [
            number.to_string(),
            node.host.clone(),
            ranges(&node.vcpus),
            or_unknown(model.now.load(number), |load| format!("{load:.2}")),
            per_second(Told::faults),
            or_unknown(told.and_then(|told| told.fault_us), |us| format!("{us:.0}")),
            per_second(|told| told.pages_in),
            per_second(|told| told.pages_out),
            or_unknown(sent, |sent| bytes(sent as u64)),
            or_unknown(told.and_then(|told| told.copies), |pages| bytes(pages.saturating_mul(4096))),
            per_second(|told| told.bounces),
        ]
    };
    model.now.nodes.iter().enumerate().map(row).collect()
}

fn vcpu_rows(model: &Model, first: usize) -> Vec<[String; 10]> {
    model.now.vcpus.iter().enumerate().skip(first).map(|(number, vcpu)| vcpu_row(number, vcpu)).collect()
}

fn page_rows(pages: &[Contended]) -> Vec<[String; 5]> {
    let rows = pages.iter().map(|page| {
        let who = page.who.iter().map(|(node, threads)| {
            let threads: Vec<String> = threads.iter().map(|(thread, faults)| format!("{thread} {faults}")).collect();
            format!("node {node}: {}", if threads.is_empty() { UNKNOWN.into() } else { threads.join(", ") })
        });
        [
            hex(page.address),
            or_unknown(page.fault_rate, rate),
            or_unknown(page.bounce_rate, rate),
            page.bounces.to_string(),
            who.collect::<Vec<_>>().join("; "),
        ]
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use krg_vmm::cluster::status::Status;
    use serde_json::json;

    use super::*;

    fn model() -> Model {
        let told = |at_ms: u64| {
            json!({"at_ms": at_ms, "dsm": {"read_faults": at_ms / 10, "write_faults": 0, "upgrade_faults": 0}, "fault_mean_us": 180.4,
                "bytes_out": at_ms * 1024, "copies": {"pages": 512}, "bounces": 7,
                "hot_pages": [{"address": 0x1f000, "faults": 9, "bounces": 7, "threads": [{"thread": "vcpu0", "faults": 9}]}]})
        };
        let status = |at_ms| {
            Status::read(&json!({"name": "m", "cpus": 2, "memory": 268_435_456u64, "sched": {"policy": "static", "moves": 3},
                "nodes": [{"host": "10.0.0.1", "online": true, "vcpus": [0, 1], "statistics": told(at_ms)},
                    {"host": "10.0.0.2", "online": false}],
                "vcpus": [{"node": 0, "migrate": true, "reason": "it was placed there at the start",
                    "load": {"state": "running", "ran": 0.5, "waited": 0.0, "stalled": 0.5, "faults": [[1, 100.0]]}},
                    {"node": 0, "migrate": false, "pin": 0, "reason": "the user\u{1b}[31m pinned it"}]}))
        };
        let mut model = Model::default();
        model.update(status(1000));
        model.update(status(3000));
        model
    }

    #[test]
    fn a_picture() {
        let text = text(&model(), Some(110));
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(text.lines().next(), Some("m: 2 vCPUs, 256 MiB on 1 nodes; policy static, 3 moves, - failed"));
        assert_eq!(words[2], ["0", "10.0.0.1", "0-1", "-", "100", "180", "-", "-", "1000", "KiB", "2", "MiB", "0"]);
        assert_eq!(words[3], ["1", "10.0.0.2", "offline", "-", "-", "-", "-", "-", "-", "-", "-"]);
        assert_eq!(&words[6][..9], ["0", "running", "0", "50%", "0%", "50%", "100", "-", "yes"]);
        assert_eq!(&words[7][..9], ["1", "-", "0", "-", "-", "-", "-", "0", "no"]);
        assert_eq!(words[10], ["0x1f000", "0", "0", "7", "node", "0:", "vcpu0", "9"]);
        assert_eq!(words.len(), 11);
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn room_is_shared() {
        assert_eq!(share(20, 2, 4, 3), Heights { nodes: 3, vcpus: 5, pages: 4 });
        assert_eq!(share(30, 100, 100, 100), Heights { nodes: 10, vcpus: 10, pages: 10 });
        assert_eq!(share(30, 1, 100, 2), Heights { nodes: 2, vcpus: 25, pages: 3 });
        assert_eq!(share(0, 1, 1, 1), Heights { nodes: 0, vcpus: 0, pages: 0 });
    }

    #[test]
    fn any_size_of_terminal_and_any_scrolling() {
        let model = model();
        for (width, height) in [(0, 0), (1, 1), (3, 2), (20, 4), (80, 7), (200, 60)] {
            for first in [0, 1, 1000] {
                let area = Rect { x: 0, y: 0, width, height };
                draw(&model, first, area, &mut Buffer::empty(area));
            }
        }
        text(&Model::default(), Some(0));
        text(&Model::default(), None);
    }
}
