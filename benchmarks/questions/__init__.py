"""Questions with known answers, on images of easy-VQA and rendered signs: for training and testing the demo model."""
