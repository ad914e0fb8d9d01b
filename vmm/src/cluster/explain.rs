//! Why a vCPU is where it is, and who fights for a page: answers for people, from what the nodes told.

use serde_json::{Value, json};

use super::admin::Admin;
use super::api::Failure;
use crate::machine::layout::home_ranges;

const PAGE: u64 = 4096;

/// A vCPU: its status, the contended pages it fights for, what the scheduler has to say, and a `message`.
pub fn vcpu(admin: &Admin, vcpu: u32) -> Value {
    let mut told = admin.vcpu_status(vcpu);
    let thread = format!("vcpu{vcpu}");
    let hot = hot_pages(admin);
    // Not every node sees a page taken away.
    let bounced = |page: &Value| hot.iter().any(|(_, hot)| hot["address"] == page["address"] && hot["bounces"].as_u64() > Some(0));
    let fought = hot.iter().filter(|(_, page)| bounced(page)).filter_map(|(node, page)| {
        let fights = page["threads"].as_array()?.iter().find(|t| t["thread"] == *thread)?;
        Some(json!({"address": page["address"], "node": node, "faults": fights["faults"]}))
    });
    let pages: Vec<Value> = fought.collect();
    let mut message = match told["node"].as_u64() {
        Some(node) => format!("vCPU {vcpu} is on node {node}: {}", told["reason"].as_str().unwrap_or("-")),
        None => format!("vCPU {vcpu} is nowhere"),
    };
    match (told["pin"].as_u64(), told["migrate"].as_bool()) {
        (_, Some(false)) => message += "; it lacks the capability MIGRATE, so nothing moves it",
        (Some(pin), _) => message += &format!("; it may only run on node {pin}"),
        _ => {}
    }
    let scheduler = admin.scheduling.explain(vcpu);
    if let Some(said) = scheduler["message"].as_str() {
        message += &format!("; {said}");
    }
    told["pages"] = pages.into();
    told["scheduler"] = scheduler;
    told["message"] = message.into();
    told
}

/// A page by any address in it: its home, and per node that tells of it the faults, the bounces and who faults.
///
/// # Errors
/// EINVAL for what is no address, EFAULT for an address that is no guest memory.
pub fn page(admin: &Admin, asked: &Value) -> Result<Value, Failure> {
    let address = address(asked).ok_or_else(|| {
        Failure::new("EINVAL", format!("{asked} is no guest-physical address; write one like 0x1f000"))
    })?;
    let homes = home_ranges(&admin.placement);
    let home = homes.iter().find(|(_, range)| range.contains(&address)).map(|(home, _)| *home);
    let Some(home) = home else {
        return Err(Failure::new("EFAULT", format!("{address:#x} is not in the guest's memory")));
    };
    let page = address / PAGE * PAGE;
    let nodes: Vec<Value> = hot_pages(admin)
        .into_iter()
        .filter(|(_, hot)| hot["address"] == page)
        .map(|(node, hot)| json!({"node": node, "faults": hot["faults"], "bounces": hot["bounces"], "threads": hot["threads"]}))
        .collect();
    let bounces: u64 = nodes.iter().filter_map(|node| node["bounces"].as_u64()).fold(0, u64::saturating_add);
    let message = match &nodes[..] {
        [] => format!("page {page:#x} is at home on node {home}; no node has it among the pages that are fought for most"),
        told => {
            let who: Vec<String> = told.iter().map(fighters).collect();
            format!(
                "page {page:#x} is at home on node {home}; it was taken away {bounces} times soon after it had come; {}",
                who.join("; ")
            )
        }
    };
    Ok(json!({"page": page, "home": home, "bounces": bounces, "nodes": nodes, "message": message}))
}

/// Who faults on a page at one node.
fn fighters(told: &Value) -> String {
    let threads = told["threads"].as_array().map(Vec::as_slice).unwrap_or_default();
    let threads: Vec<String> = threads
        .iter()
        .filter_map(|t| Some(format!("{} {}", t["thread"].as_str()?, t["faults"].as_u64()?)))
        .collect();
    format!("faults on node {}: {}", told["node"], if threads.is_empty() { "-".into() } else { threads.join(", ") })
}

/// Every contended page that a node told of last, with that node.
fn hot_pages(admin: &Admin) -> Vec<(usize, Value)> {
    let nodes = 0..admin.names.len();
    nodes
        .flat_map(|node| match admin.statistics.of(node)["hot_pages"].take() {
            Value::Array(pages) => pages.into_iter().map(|page| (node, page)).collect(),
            _ => Vec::new(),
        })
        .collect()
}

/// A number, or a text that is one, in hexadecimal after `0x`.
fn address(asked: &Value) -> Option<u64> {
    match asked {
        Value::String(text) => match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) if digits.starts_with('+') => None,
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None if text.starts_with('+') => None,
            None => text.parse().ok(),
        },
        other => other.as_u64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let of = |value: Value| address(&value);
        assert_eq!([of(json!(4096)), of(json!("4096")), of(json!("0x1000")), of(json!("0XFF"))], [4096, 4096, 4096, 255].map(Some));
        for none in [json!(-1), json!("x"), json!("0x"), json!("+1"), json!("0x+1"), json!(null), json!(1.5), json!("0x10000000000000000")] {
            assert_eq!(of(none.clone()), None, "{none}");
        }
    }
}
