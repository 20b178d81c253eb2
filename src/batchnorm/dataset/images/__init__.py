"""Images: decoded by Pillow, and summed in whole numbers, so that every order gives the same bits.

`decoding` turns the bytes of one image into sums, `chunks` measures some images in one process, and
`measuring` all of them. `report` is what stands out among them.
"""
