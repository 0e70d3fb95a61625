"""What the booting tests share: private state roots, the daemon's and the keeper's protocols, traces, terminals."""
