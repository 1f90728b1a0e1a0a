"""Commands about finished things: pack, export, merge, inspect, audit."""
