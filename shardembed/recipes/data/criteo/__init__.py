"""The layout of the Criteo data: its columns (`schema`), and clicks made up in them (`planted`)."""
