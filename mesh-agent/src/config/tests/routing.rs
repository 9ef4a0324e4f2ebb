//! Routes: precedence, ownership, backends.
