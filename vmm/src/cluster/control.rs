//! Opens what users and programs reach a running machine by.

use std::ffi::OsStr;
use std::sync::Arc;

use serde_json::json;

use super::admin::Admin;
use super::api::Api;
use super::error::FrontError;
use super::front::Options;
use super::metrics;
use super::report::Reporter;
use super::scrape;
use super::sockets;
use super::status::Status;

/// Opens the control socket, and the metrics if they are wanted.
///
/// # Errors
/// When it can't be where the user said.
pub fn open(options: &Options, admin: Admin, reporter: Reporter) -> Result<Option<Api>, FrontError> {
    let admin = Arc::new(admin);
    if let Some(address) = options.metrics {
        let admin = admin.clone();
        let text = move || metrics::text(&Status::read(&admin.status())).ok();
        let address = scrape::serve(address, text).map_err(FrontError::System)?;
        let event = json!({"event": "metrics", "address": address.to_string()});
        reporter.event(&format!("metrics at http://{address}/metrics"), &event);
    }
    listen(options, admin, reporter)
}

/// Listens where the user said, or else where that is usual; there it may fail.
fn listen(options: &Options, admin: Arc<Admin>, reporter: Reporter) -> Result<Option<Api>, FrontError> {
    let answer = move |request| admin.answer(request);
    if let Some(path) = &options.api {
        return Api::listen(path, answer).map(Some).map_err(FrontError::System);
    }
    let opened = sockets::directory()
        .ok_or_else(|| "neither KRG_RUNTIME_DIR nor XDG_RUNTIME_DIR says where".to_owned())
        .and_then(|directory| sockets::claim(&directory, &options.name))
        .and_then(|place| Ok((Api::listen(&place.path, answer)?, place.path)));
    let (line, path, api) = match opened {
        Ok((api, path)) if path.file_stem() == Some(OsStr::new(&options.name)) => (String::new(), Some(path), Some(api)),
        Ok((api, path)) => (format!("the control socket is {}", path.display()), Some(path), Some(api)),
        Err(error) => (format!("no control socket: {error}; use --api"), None, None),
    };
    reporter.event(&line, &json!({"event": "control_socket", "path": path, "message": line}));
    Ok(api)
}
