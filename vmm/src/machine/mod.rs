//! The machine one host runs: vCPUs, interrupts, firmware tables, device bus.
