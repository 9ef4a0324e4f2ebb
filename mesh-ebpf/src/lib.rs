//! Empty: exists so that cargo tracks this crate. The program is `main.rs`.
#![no_std]
