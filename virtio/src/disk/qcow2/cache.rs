//! A small cache of tables and unpacked clusters by their offset in the file.

use std::sync::Arc;

/// Keeps the entries used last. A linear search, as there are only a few.
pub(super) struct Cache<T> {
    /// Used last comes last.
    entries: Vec<(u64, Arc<T>)>,
    limit: usize,
}

impl<T> Cache<T> {
    pub(super) fn new(limit: usize) -> Cache<T> {
        Cache {
            entries: Vec::with_capacity(limit),
            limit,
        }
    }

    pub(super) fn get(&mut self, offset: u64) -> Option<Arc<T>> {
        let at = self.entries.iter().position(|(key, _)| *key == offset)?;
        let entry = self.entries.remove(at);
        let value = entry.1.clone();
        self.entries.push(entry);
        Some(value)
    }

    pub(super) fn insert(&mut self, offset: u64, value: Arc<T>) {
        if self.entries.iter().any(|(key, _)| *key == offset) {
            return;
        }
        if self.entries.len() >= self.limit {
            self.entries.remove(0);
        }
        self.entries.push((offset, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_used_longest_ago_goes_first() {
        let mut cache = Cache::new(2);
        cache.insert(1, Arc::new('a'));
        cache.insert(2, Arc::new('b'));
        assert_eq!(cache.get(1).as_deref(), Some(&'a'));
        cache.insert(3, Arc::new('c'));
        assert!(cache.get(2).is_none() && cache.get(1).is_some() && cache.get(3).is_some());
    }
}
