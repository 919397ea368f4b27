"""One server over many replicas of an engine, on Ray Serve (needs the extra `ray`); see docs/fleet.md."""
