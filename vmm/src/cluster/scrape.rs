//! The endpoint that Prometheus scrapes (`--metrics`): as little of HTTP as that needs. Clients are untrusted: each
//! has one request, of bounded size, and a bounded time.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use krg_dsm::transport::Deadline;

use super::errno;
use super::metrics::CONTENT_TYPE;

/// Most bytes of a request.
const MAX_REQUEST: usize = 8 << 10;
/// Most header fields of a request.
const MAX_HEADERS: usize = 64;
/// Most clients at one time.
const MAX_CLIENTS: usize = 8;
/// How long a client may take to ask, and to take the answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Answers `GET /metrics` at `address` by what `metrics` says, for as long as the process runs; the address it has.
///
/// # Errors
/// One line for people.
pub fn serve(
    address: SocketAddr,
    metrics: impl Fn() -> Option<String> + Send + Sync + 'static,
) -> Result<SocketAddr, String> {
    let failed = |error: &io::Error| format!("--metrics {address}: {}", errno::describe(error));
    let listener = TcpListener::bind(address).map_err(|error| failed(&error))?;
    let address = listener.local_addr().map_err(|error| failed(&error))?;
    let metrics = Arc::new(metrics);
    let clients = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let (metrics, served) = (metrics.clone(), Served::new(&clients));
            if served.0.load(Ordering::SeqCst) > MAX_CLIENTS {
                continue;
            }
            // A client without a thread is dropped, and its number with it.
            let _ = thread::Builder::new().name("scrape".into()).spawn(move || {
                let _served = served;
                // A client that does not ask, or is gone, gets no answer.
                let _ = answer(&client, &*metrics);
            });
        }
    };
    thread::Builder::new().name("metrics".into()).spawn(accept).map_err(|error| failed(&error))?;
    Ok(address)
}

/// Counts a client as long as it lives.
struct Served(Arc<AtomicUsize>);

impl Served {
    fn new(clients: &Arc<AtomicUsize>) -> Self {
        clients.fetch_add(1, Ordering::SeqCst);
        Self(clients.clone())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn answer(mut client: &TcpStream, metrics: &dyn Fn() -> Option<String>) -> io::Result<()> {
    client.set_write_timeout(Some(LIMIT))?;
    let (status, kind, body, head_only) = match read_request(client)? {
        Asked::Metrics { head_only } => match metrics() {
            Some(text) => ("200 OK", CONTENT_TYPE, text, head_only),
            None => ("500 Internal Server Error", TEXT, "there are no metrics\n".into(), head_only),
        },
        Asked::Refused(status) => (status, TEXT, format!("{status}; metrics are at /metrics\n"), false),
    };
    let mut reply = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if !head_only {
        reply += &body;
    }
    client.write_all(reply.as_bytes())?;
    client.shutdown(std::net::Shutdown::Write)
}

const TEXT: &str = "text/plain; charset=utf-8";

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Metrics { head_only: bool },
    Refused(&'static str),
}

/// Reads until the request is complete; its body, if it has one, is nobody's.
fn read_request(client: &TcpStream) -> io::Result<Asked> {
    let mut client = Deadline::new(client, Instant::now() + LIMIT);
    let mut bytes = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let count = client.read(&mut buffer)?;
        bytes.extend_from_slice(&buffer[..count]);
        if let Some(asked) = parse(&bytes) {
            return Ok(asked);
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// What is asked; `None`: more has to come.
fn parse(bytes: &[u8]) -> Option<Asked> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) if bytes.len() < MAX_REQUEST => return None,
        Ok(httparse::Status::Complete(length)) if length <= MAX_REQUEST => {}
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return Some(Asked::Refused("431 Request Header Fields Too Large"));
        }
        Err(_) => return Some(Asked::Refused("400 Bad Request")),
    }
    let path = request.path.unwrap_or_default().split('?').next();
    Some(match (request.method, path) {
        (Some("GET"), Some("/metrics")) => Asked::Metrics { head_only: false },
        (Some("HEAD"), Some("/metrics")) => Asked::Metrics { head_only: true },
        (Some("GET" | "HEAD"), _) => Asked::Refused("404 Not Found"),
        _ => Asked::Refused("405 Method Not Allowed"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        // It may be refused before it has said everything.
        let _ = client.write_all(request);
        let mut reply = String::new();
        let _ = client.read_to_string(&mut reply);
        reply
    }

    #[test]
    fn requests() {
        let asked = |text: &str| parse(text.as_bytes());
        let refused = |text: &str| match asked(text) {
            Some(Asked::Refused(status)) => status.split(' ').next().unwrap().to_owned(),
            other => format!("{other:?}"),
        };
        assert_eq!(asked("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), Some(Asked::Metrics { head_only: false }));
        assert_eq!(asked("GET /metrics?x=1 HTTP/1.0\r\n\r\n"), Some(Asked::Metrics { head_only: false }));
        assert_eq!(asked("HEAD /metrics HTTP/1.1\r\n\r\n"), Some(Asked::Metrics { head_only: true }));
        assert_eq!([asked(""), asked("GET /met"), asked("GET /metrics HTTP/1.1\r\nHost: a\r\n")], [None, None, None]);
        assert_eq!(refused("GET / HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(refused("POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\n"), "405");
        assert_eq!([refused("\x00\x01\x02"), refused("hello there\r\n\r\n")], ["400", "400"]);
        assert_eq!(refused(&format!("GET /metrics HTTP/1.1\r\nA: {}", "a".repeat(MAX_REQUEST))), "431");
        assert_eq!(refused(&format!("GET /metrics HTTP/1.1\r\n{}", "A: b\r\n".repeat(MAX_HEADERS + 1))), "431");
    }

    #[test]
    fn a_scrape_and_clients_that_are_none() {
        let address = serve("127.0.0.1:0".parse().unwrap(), || Some("krg_vcpus 2.0\n# EOF\n".into())).unwrap();
        let reply = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(reply.starts_with("HTTP/1.1 200 OK\r\n") && reply.ends_with("\r\n\r\nkrg_vcpus 2.0\n# EOF\n"), "{reply}");
        assert!(reply.contains("Content-Length: 20\r\n"), "{reply}");
        assert!(ask(address, b"HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(ask(address, b"GET /secret HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(serve(address, || None).is_err_and(|line| line.contains("EADDRINUSE")));
        // Those who do not ask keep nobody else from it once they are gone.
        for _ in 0..3 {
            drop((0..MAX_CLIENTS).map(|_| TcpStream::connect(address).unwrap()).collect::<Vec<_>>());
        }
        let until = Instant::now() + 2 * LIMIT;
        while !ask(address, b"GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200") {
            assert!(Instant::now() < until);
        }
    }
}
