"""The outside world, one file each; foreign errors become ours here."""
