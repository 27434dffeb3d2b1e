"""The only place for workarounds of upstream versions: each entry with its link and the condition for its removal."""
