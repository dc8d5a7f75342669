"""Pairs of matched and mismatched expressions (GITM-MR) from pictures that people have: `jaxmllm data relations`.

| `--from`                          | what it has                                                   | mismatches are         |
|-----------------------------------|---------------------------------------------------------------|------------------------|
| `world?size=84x84&rivals=1`       | drawn scenes; options are fields of the world's spec          | verified by search     |
| `coco:instances.json`             | photographs with boxes (images)                               | verified by geometry   |
| `gqa:sceneGraphs.json`            | photographs with boxes, attributes and relations (images)     | verified by geometry   |
|                                   |                                                               | where it decides, else |
|                                   |                                                               | unverified             |
| `refcoco:PATH`                    | photographs with expressions of people; graphs are parsed     | unverified             |
| `gitm:FOLDER`                     | the published files, as JSON (images)                         | as published           |

Modules: `pictures` (what is in a picture and what is true about it), `build` (pairs, cells, balance, files), `written`
(expressions that people wrote).
"""
