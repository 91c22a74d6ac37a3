"""What a run leaves: its folder, record, audit and gates, and their verification."""
