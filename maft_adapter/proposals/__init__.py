"""Class-agnostic mask generators: pictures in, (N, H, W) masks out, no names and no ground truth."""
