//! The user's side: commands that run, print and end.

pub mod validate;
