//! The registers through which a guest powers off or resets: ACPI's hardware-reduced sleep
//! registers (ACPI 6.5, 4.8.3.7), its reset register (4.8.3.6), and the PC's ports for the same.

use super::fabric::End;

/// Sleep control register, offset in the register page.
pub const SLEEP_CONTROL: u64 = 0;
/// Sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Reset register.
pub const RESET: u64 = 2;
/// What to write to the reset register.
pub const RESET_VALUE: u8 = 0x42;
/// SLP_TYP of S5, as `_S5` in the DSDT says.
pub const S5_TYPE: u8 = 5;
/// The PC's reset control port: bit 2 resets.
pub const RESET_PORT: u16 = 0xcf9;
/// The keyboard controller's command port: [`PULSE_RESET`] resets.
pub const KEYBOARD_PORT: u16 = 0x64;
/// Keyboard controller command that pulses the CPU's reset line.
pub const PULSE_RESET: u8 = 0xfe;

/// SLP_EN in the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;

/// What a write of a byte at `offset` in the register page does.
pub fn register_write(offset: u64, value: u8) -> Option<End> {
    match offset {
        SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == S5_TYPE => Some(End::PowerOff),
        RESET if value == RESET_VALUE => Some(End::Reset),
        _ => None,
    }
}

/// What a write of a byte to an I/O port does, if it is one of the reset ports.
pub fn port_write(port: u16, value: u8) -> Option<End> {
    match port {
        RESET_PORT if value & 4 != 0 => Some(End::Reset),
        KEYBOARD_PORT if value == PULSE_RESET => Some(End::Reset),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_agreed_values_end_the_machine() {
        assert_eq!(register_write(SLEEP_CONTROL, 0x34), Some(End::PowerOff));
        assert_eq!(register_write(SLEEP_CONTROL, 0x14), None, "type without enable");
        assert_eq!(register_write(SLEEP_CONTROL, 0x2c), None, "S3");
        assert_eq!(register_write(RESET, RESET_VALUE), Some(End::Reset));
        assert_eq!(register_write(RESET, 0), None);
        assert_eq!(port_write(RESET_PORT, 0x02), None);
        assert_eq!(port_write(RESET_PORT, 0x06), Some(End::Reset));
        assert_eq!(port_write(KEYBOARD_PORT, 0xfe), Some(End::Reset));
    }
}
