//! The client: an NBD export as a driver.
