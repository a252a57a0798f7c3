"""Questions with known answers, on images of easy-VQA and rendered signs: what the demo model learns and is asked."""
