#![no_std]
#![no_main]

/// The verifier rejects a program in which this can be reached.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
