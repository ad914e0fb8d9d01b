//! The engine written down: for snapshots, whose other half is the memory's map and content.

use serde::{Deserialize, Serialize};

use super::engine::{Access, Engine};
use super::geometry::Geometry;

/// Version of [`EngineState`].
const VERSION: u32 = 10;

/// All that one node's engine knows, requests under way and messages held back included. The messages
/// between the nodes are not in it: a snapshot is taken when none is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineState<const W: usize> {
    /// Layout of this structure.
    pub version: u32,
    engine: Engine<W>,
}

/// Why a saved state can't be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Written by another version.
    #[error("saved protocol state: version {0} is not {VERSION}")]
    Version(u32),
    /// Other pages, homes or nodes than this machine's.
    #[error("saved protocol state: it is of another machine, or damaged")]
    Shape,
}

impl<const W: usize> Engine<W> {
    /// The state to save.
    pub fn save(&self) -> EngineState<W> {
        EngineState { version: VERSION, engine: self.clone() }
    }

    /// The engine of a machine with this geometry, as it was saved.
    ///
    /// # Errors
    /// Another version, another machine, or contents that are not of this machine's pages.
    pub fn restore(state: EngineState<W>, geometry: &Geometry) -> Result<Self, StateError> {
        if state.version != VERSION {
            return Err(StateError::Version(state.version));
        }
        let engine = state.engine;
        let pages = geometry.pages() as usize;
        let fits = engine.geometry == *geometry
            && usize::from(engine.me) < geometry.nodes()
            && engine.access.len() == pages
            && engine.taken.len() == pages
            && engine.zero_group > 0
            && engine.zero_block > 0
            && engine.loopback.is_empty()
            && engine.freeing.values().all(|homes| homes.fits(geometry.nodes()) && !homes.is_empty())
            && engine.gone.fits(geometry.nodes())
            && !engine.gone.contains(engine.me)
            && engine.pending.values().all(|pending| pending.acks.fits(geometry.nodes()))
            && engine.fence.fits(engine.me, geometry)
            && engine.pending.keys().chain(engine.ahead.keys()).chain(engine.given.keys()).all(|page| (*page as usize) < pages)
            && engine.blocks_fit()
            && engine.directory.fits(engine.me, geometry)
            && engine.taking_fits()
            && engine.tables.fits(geometry)
            && engine.access.iter().filter(|access| **access == Access::Replicated).count() == engine.tables.len()
            && engine.tables.held().into_iter().all(|page| engine.access[page as usize] == Access::Replicated);
        if fits { Ok(engine) } else { Err(StateError::Shape) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Quiet;
    use super::super::{Input, Message, Output};
    use super::*;

    fn engine(geometry: &Geometry) -> Engine<4> {
        let mut engine = Engine::new(0, geometry.clone(), std::slice::from_ref(&(0..1)), 0..1, true);
        for page in [1, 5, 6] {
            engine.step(Input::Fault { page, write: page != 5 }, &mut Quiet::default(), &mut Output::default()).unwrap();
        }
        engine
    }

    /// Home of pages with sharers, with requests under way and waiting, and with replicas.
    fn home(geometry: &Geometry) -> Engine<4> {
        let mut engine = Engine::new(0, geometry.clone(), &[], 0..0, true);
        let get = |page, write| Message::Get { page, write, table: false };
        let inputs = [
            Input::Fault { page: 1, write: true },
            Input::Message { from: 1, message: get(1, false) },
            Input::Message { from: 2, message: get(1, false) },
            Input::Message { from: 1, message: get(2, true) },
            Input::Message { from: 2, message: get(2, true) },
            Input::Fault { page: 2, write: false },
            Input::Message { from: 1, message: get(3, true) },
            Input::Fault { page: 3, write: true },
            Input::Message { from: 1, message: Message::Promote { page: 3, requester: 0, level: 1, data: Box::default() } },
        ];
        for input in inputs {
            engine.step(input, &mut Quiet::default(), &mut Output::default()).unwrap();
        }
        assert_eq!(engine.replicas(), 1);
        engine
    }

    #[test]
    fn directories_that_name_other_nodes_or_contradict_themselves_are_refused() {
        let geometry = Geometry::new(&[(0, 8)], &[4, 2, 2]);
        let engine = home(&geometry);
        let text = serde_json::to_string(&engine.save()).unwrap();
        assert_eq!(Engine::restore(serde_json::from_str(&text).unwrap(), &geometry), Ok(engine));
        for (from, to) in [
            (r#""sharers":[1,2]"#, r#""sharers":[1,3]"#),
            (r#""sharers":[1,2]"#, r#""sharers":[0,1]"#),
            (r#"{"by":2,"owner":1,"acks":[]}"#, r#"{"by":2,"owner":3,"acks":[]}"#),
            (r#"{"by":2,"owner":1,"acks":[]}"#, r#"{"by":3,"owner":1,"acks":[]}"#),
            (r#"{"by":2,"owner":1,"acks":[]}"#, r#"{"by":0,"owner":1,"acks":[]}"#),
            (r#"{"by":2,"owner":1,"acks":[]}"#, r#"{"by":2,"owner":1,"acks":[3]}"#),
            (r#""busy":{"2""#, r#""busy":{"5""#),
            (r#"[{"from":0,"#, r#"[{"from":9,"#),
            (r#""queues":{"2""#, r#""queues":{"1""#),
            (r#""masters":{"3":{"level":1,"holders":[0,1]"#, r#""masters":{"3":{"level":1,"holders":[0,3]"#),
            (r#""masters":{"3":{"level":1,"holders":[0,1]"#, r#""masters":{"3":{"level":5,"holders":[0,1]"#),
            (r#""masters":{"3""#, r#""masters":{"0""#),
            (r#""Replicated""#, r#""Shared""#),
            (r#""gone":[]"#, r#""gone":[0]"#),
            (r#""gone":[]"#, r#""gone":[3]"#),
            (r#""merges":{}"#, r#""merges":{"1":[4]}"#),
            (r#""relays":{}"#, r#""relays":{"1":{"origin":3,"origin_id":1,"due":[1]}}"#),
            (r#""loopback":[]"#, r#""loopback":[{"Gone":{"page":1}}]"#),
        ] {
            assert!(text.contains(from), "{from} in {text}");
            let damaged: EngineState<4> = serde_json::from_str(&text.replacen(from, to, 1)).unwrap();
            assert_eq!(Engine::restore(damaged, &geometry), Err(StateError::Shape), "{to}");
        }
        let beyond = text.replacen(r#""sharers":[1,2]"#, r#""sharers":[1,2000]"#, 1);
        assert!(serde_json::from_str::<EngineState<4>>(&beyond).is_err(), "no machine has so many nodes");
    }

    #[test]
    fn a_state_with_requests_under_way_comes_back_as_it_was() {
        let geometry = Geometry::new(&[(0, 8)], &[4, 4]);
        let engine = engine(&geometry);
        assert_eq!(engine.pending(), 2);
        let text = serde_json::to_string(&engine.save()).unwrap();
        let state: EngineState<4> = serde_json::from_str(&text).unwrap();
        assert_eq!(Engine::restore(state, &geometry), Ok(engine));
    }

    #[test]
    fn states_that_do_not_fit_are_refused() {
        let geometry = Geometry::new(&[(0, 8)], &[4, 4]);
        let state = engine(&geometry).save();
        let other = Geometry::new(&[(0, 8)], &[5, 3]);
        assert_eq!(Engine::restore(state.clone(), &other), Err(StateError::Shape));
        let newer = EngineState { version: VERSION + 1, ..state.clone() };
        assert_eq!(Engine::restore(newer, &geometry), Err(StateError::Version(VERSION + 1)));
        let text = serde_json::to_string(&state).unwrap();
        for (from, to) in [
            (r#""taken":["#, r#""taken":[0,"#),
            (r#""me":0"#, r#""me":1"#),
            (r#""me":0"#, r#""me":9"#),
            (r#""pending":{"5""#, r#""pending":{"500""#),
            (r#""owner":0"#, r#""owner":7"#),
            (r#""zero_group":1"#, r#""zero_group":0"#),
            (r#""zero_block":1"#, r#""zero_block":0"#),
        ] {
            assert!(text.contains(from), "{from} in {text}");
            let damaged: EngineState<4> = serde_json::from_str(&text.replacen(from, to, 1)).unwrap();
            assert_eq!(Engine::restore(damaged, &geometry), Err(StateError::Shape), "{to}");
        }
    }
}
