//! What `krg top` shows: the last status of a machine, and rates from the figures before.

use std::collections::BTreeMap;

use krg_vmm::cluster::status::{Status, Told};

/// The machine, as two tellings of each node show it.
#[derive(Debug, Default)]
pub struct Model {
    /// What was said last.
    pub now: Status,
    /// What each node had told before it told what `now` has.
    before: Vec<Option<Told>>,
}

/// A page that hosts fight for.
#[derive(Debug, PartialEq)]
pub struct Contended {
    /// Guest-physical address.
    pub address: u64,
    /// Times it was taken away soon after it had come, everywhere.
    pub bounces: u64,
    /// The same a second.
    pub bounce_rate: Option<f64>,
    /// Faults a second, everywhere.
    pub fault_rate: Option<f64>,
    /// By node: who faults, and how often.
    pub who: Vec<(usize, Vec<(String, u64)>)>,
}

impl Model {
    /// A new status has come.
    pub fn update(&mut self, status: Status) {
        let old = std::mem::replace(&mut self.now, status);
        let mut before = std::mem::take(&mut self.before);
        before.resize(self.now.nodes.len(), None);
        for ((before, node), old) in before.iter_mut().zip(&self.now.nodes).zip(old.nodes) {
            if let (Some(now), Some(old)) = (&node.told, old.told) {
                if now.at_ms != old.at_ms {
                    *before = Some(old);
                }
            }
        }
        self.before = before;
    }

    /// Whether every node that is online has told its figures twice.
    pub fn complete(&self) -> bool {
        let mut online = self.now.nodes.iter().zip(&self.before).filter(|(node, _)| node.online);
        online.all(|(node, before)| node.told.is_some() && before.is_some())
    }

    /// How fast a counter of a node rises.
    pub fn rate(&self, node: usize, counter: impl Fn(&Told) -> Option<u64>) -> Option<f64> {
        self.now.nodes.get(node)?.told.as_ref()?.rate(self.before.get(node)?.as_ref(), counter)
    }

    /// Pages that hosts fight for, those first that bounce most now.
    pub fn contended(&self) -> Vec<Contended> {
        let mut pages: BTreeMap<u64, Contended> = BTreeMap::new();
        for (number, node) in self.now.nodes.iter().enumerate() {
            let Some(told) = &node.told else { continue };
            for hot in &told.hot_pages {
                let counted = |of: fn(&krg_vmm::cluster::status::HotPage) -> u64| {
                    self.rate(number, |told| told.hot_pages.iter().find(|page| page.address == hot.address).map(of))
                };
                let (bounces, faults) = (counted(|page| page.bounces), counted(|page| page.faults));
                let page = pages.entry(hot.address).or_insert(Contended {
                    address: hot.address,
                    bounces: 0,
                    bounce_rate: None,
                    fault_rate: None,
                    who: Vec::new(),
                });
                page.bounces = page.bounces.saturating_add(hot.bounces);
                page.bounce_rate = plus(page.bounce_rate, bounces);
                page.fault_rate = plus(page.fault_rate, faults);
                page.who.push((number, hot.threads.clone()));
            }
        }
        // A page that was fetched once is nothing to fight for.
        let mut pages: Vec<_> = pages.into_values().filter(|page| page.bounces > 0).collect();
        pages.sort_by(|a, b| {
            let rates = b.bounce_rate.unwrap_or(0.0).total_cmp(&a.bounce_rate.unwrap_or(0.0));
            rates.then(b.bounces.cmp(&a.bounces))
        });
        pages
    }
}

/// The sum of what is known.
fn plus(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(at_ms: u64, bounces: u64) -> Status {
        let page = |address, bounces| json!({"address": address, "faults": bounces, "bounces": bounces,
            "threads": [{"thread": "vcpu0", "faults": 3}]});
        let told = |pages| json!({"at_ms": at_ms, "bounces": bounces, "hot_pages": pages});
        Status::read(&json!({
            "nodes": [
                {"online": true, "statistics": told(json!([page(0x1000, bounces), page(0x2000, 5000), page(0x3000, 0)]))},
                {"online": true, "statistics": told(json!([page(0x1000, bounces)]))},
                {"online": false}],
            "vcpus": [{"node": 0, "load": {"ran": 0.5, "waited": 0.25}}, {"node": 1, "load": {"ran": 0.5}}]}))
    }

    #[test]
    fn rates_need_two_tellings_and_the_same_one_twice_is_one() {
        let mut model = Model::default();
        let rate = |model: &Model| model.rate(0, |told| told.bounces);
        model.update(status(1000, 10));
        assert_eq!((rate(&model), model.complete()), (None, false));
        model.update(status(1000, 10));
        assert_eq!((rate(&model), model.complete()), (None, false));
        model.update(status(3000, 50));
        assert_eq!((rate(&model), model.complete()), (Some(20.0), true));
        model.update(status(3000, 50));
        assert_eq!((rate(&model), model.rate(2, |told| told.bounces), model.rate(9, |_| Some(1))), (Some(20.0), None, None));
        assert_eq!([0, 1, 2].map(|node| model.now.load(node)), [Some(0.75), None, None]);
    }

    #[test]
    fn a_page_is_one_wherever_it_is_fought_for_and_the_hottest_now_is_first() {
        let mut model = Model::default();
        model.update(status(1000, 10));
        assert_eq!(model.contended()[0].address, 0x2000);
        model.update(status(2000, 40));
        let pages = model.contended();
        assert_eq!((pages[0].address, pages[0].bounces, pages[0].bounce_rate), (0x1000, 80, Some(60.0)));
        assert_eq!(pages[0].who.iter().map(|(node, _)| *node).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(pages.len(), 2);
        assert_eq!((pages[1].address, pages[1].bounce_rate), (0x2000, Some(0.0)));
    }
}
