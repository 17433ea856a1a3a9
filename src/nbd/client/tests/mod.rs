//! Tests against scripted peers.
