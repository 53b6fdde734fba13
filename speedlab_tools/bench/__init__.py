"""Running scenarios on a server and keeping their rows."""
