"""What an engine holds: a prefix tree shared by all workflows, or slots with one owner each."""
