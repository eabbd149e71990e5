"""What several benchmarks need: arms in turns, calls and what they show, engines, tables, drawings, pages."""
