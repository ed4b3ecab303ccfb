"""The embedded world of handwritten digits: real scans, which no rule draws and a small classifier can mistake."""
