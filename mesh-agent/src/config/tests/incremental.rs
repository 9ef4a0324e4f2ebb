//! What a change leaves alone.
