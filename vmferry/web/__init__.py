"""What a service shows over HTTP to its own host: its metrics, and a page for people. Read only."""
