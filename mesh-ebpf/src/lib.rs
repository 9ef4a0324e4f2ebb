//! Empty: it only gives cargo a library to track the crate by.

#![no_std]
