"""The test suite; mirrors the floors."""
