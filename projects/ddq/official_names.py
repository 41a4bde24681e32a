"""Names of MMDetection 3's checkpoints of DDQ, beside those that they share with its DINO."""
