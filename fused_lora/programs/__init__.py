"""Programs: what a call does, decided once and written out as a straight line.

signature (what the call is given, beside the numbers)  ->  program (built once)  ->  run
"""
