"""What compare.py and demo.py do: commands, tables, reports."""
