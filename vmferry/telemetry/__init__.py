"""What tells people what happened: spans, logs, and the timeline of a trace."""
