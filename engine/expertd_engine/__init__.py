"""The engine process: tokens in, tokens out, inside a byte budget. One thread owns all state."""
