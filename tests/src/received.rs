//! A process of a cluster that receives anything over a connection, and true frames that somebody has changed.

use lite_llm_hw::cluster::is_said;
use lite_llm_hw::net::{Key, Receiver, Sender};
use std::io::{Cursor, Read, Write};

/// A connection on which these bytes come; what is written goes nowhere.
struct Connection<'a>(Cursor<&'a [u8]>);

impl Read for Connection<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Connection<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Takes bytes as a handshake from either side, as frames of a session, as what is in a frame, and as what became of frames.
///
/// # Panics
/// If somebody without the key is heard, or a frame that is received is not the next that was sent.
pub fn anything_received(bytes: &[u8]) {
    let key = Key::new([7; 32]);
    assert!(Receiver::begin(Connection(Cursor::new(bytes)), &key).is_err(), "nobody guesses a proof");
    assert!(Sender::begin(Connection(Cursor::new(bytes)), &key).is_err(), "nobody guesses a proof");
    assert!(Receiver::of_session(bytes, [7; 32]).receive().is_err(), "nobody guesses a hash");
    let _ = is_said(bytes);
    changed(bytes);
}

/// Sends the bytes as frames of eight, and changes the wire as their last five say.
fn changed(bytes: &[u8]) {
    let Some((frames, &[how, a, b, c, d])) = bytes.split_last_chunk::<5>() else { return };
    let mut wire = Vec::new();
    let mut sender = Sender::of_session(&mut wire, [9; 32]);
    for frame in frames.chunks(8) {
        sender.send(frame).expect("a vector takes everything");
    }
    let place = |high: u8, low: u8| usize::from(u16::from_be_bytes([high, low])) % (wire.len() + 1);
    let (from, to) = (place(a, b), place(c, d));
    let (from, to) = (from.min(to), from.max(to));
    match how % 4 {
        0 => {
            if let Some(byte) = wire.get_mut(from) {
                *byte ^= d | 1;
            }
        }
        1 => drop(wire.drain(from..to)),
        2 => {
            let part = wire[from..to].to_vec();
            drop(wire.splice(to..to, part));
        }
        _ => wire.rotate_left(from),
    }
    let mut receiver = Receiver::of_session(&wire[..], [9; 32]);
    let mut sent = frames.chunks(8);
    while let Ok(frame) = receiver.receive() {
        assert_eq!(Some(&frame[..]), sent.next(), "a frame is the next that was sent");
    }
}
