"""Bad invocations of the programs of many runs and of a federation's members, as in
`experiments_refusals`.
"""

CASE_STUDY = """
--study=xrays                               | study | xrays | chest_xray
--seeds=0,x                                 | seeds | 0,x | commas
--seeds=1,1                                 | seeds | 1,1 | once
--epsilons=-1                               | epsilons | -1 | positive
--arms=federated,polled                     | arms | polled | pooled
--arms=local                                | arms | local | add secure
--train_flags='--rounds                     | train_flags | --rounds | quotation
--private_flags=--roundz=2                  | roundz | not a flag | --rounds
--run_dir=                                  | run_dir | is empty | --run_dir=
--run_dir={file}                            | run_dir | {file} | folder
--run_dir={full}                            | run_dir | {full} | another --run_dir
--run_dir={run}                             | run_dir | {run} | another --run_dir
"""

SEARCH = """
EXAMPLE                                     | dp | example | dp=none
SITE                                        | dp | site | dp=none
--validation=none                           | validation | none | validation=exact
--num_sites=1                               | num_sites | 1 | 2 or more
--placement=flower                          | placement | flower | placement=auto
--record_transcript                         | record_transcript | True | leave
--fewest_patients=5                         | fewest_patients | 5 | use 0
--subgroups=site                            | subgroups | site | primia-train
--trials=0                                  | --trials | 0 | positive
--pruner=hyperband                          | pruner | hyperband | median
--space=lr=1:2                              | space | lr | --helpfull
--space=learning_rate=2:1                   | space | 2:1 | NAME=LOW:HIGH
--space=momentum=0.1:0.9                    | space | momentum | optimizer=momentum
--adam_beta1=1                              | adam_beta1 | 1 | [0, 1)
--data=npz:{missing}                        | data | {missing} | check
--run_dir={run}                             | run_dir | {run} | another
"""

SITE = """
                                            | no command | init, roster | --help
begin                                       | 'begin' | not a command | init, roster
--number=0                                  | no command | init, roster | --help
init --number=x                             | --number | x | integer
init                                        | site_dir | is empty | --site_dir=
status                                      | site_dir | is empty | --site_dir=
status --site_dir={missing}                 | site_dir | {missing} | primia-site init
status --site_dir={file}                    | site_dir | {file} | folder
status --site_dir={folder} --number=3       | number | init | leave it out
status --site_dir={folder} --renumber        | renumber | roster | leave it out
approve --site_dir={folder}                 | site_dir | {folder} | primia-site init
intersect --site_dir={folder}               | site_dir | {folder} | primia-site init
offer --site_dir={folder}                   | site_dir | {folder} | primia-site init
status --site_dir={folder} --settings=x     | settings | offer | leave it out
status --site_dir={folder} --model=x        | model | offer | leave it out
init --site_dir={new} extra                 | extra | is not a flag | --name=value
"""

SITE_INIT = """
--number=-1                                 | number | -1 | from 0
--name=Hospital_A                           | name | Hospital_A | letters
--data=                                     | data | is empty | --data=none
--data=folder:{missing}                     | data | {missing} | check
--data=zip:{file}                           | data | zip: | folder:PATH
--data=none --layout=class                  | layout | class | leave it out
--data=npz:{file} --layout=class            | layout | class | leave it out
--role=server                               | role | server | coordinator
--role=coordinator                          | number | 0 | coordinator has no
--site_dir={full}                           | site_dir | {full} | another
--site_dir={file}                           | site_dir | {file} | folder
--fewest_patients=-1                        | fewest_patients | -1 | no floor
--max_epsilon=-1                            | max_epsilon | -1 | positive
--config={file}                             | config | approve | leave it out
"""

PLOT = """
--kind=pie                                  | kind | pie | latency
--kind=epsilon                              | output_dir | epsilon | --output_dir=pictures
--kind=roc --run_dir={folder}               | run_dir | {folder} | finished training run
--kind=latency --run_dir={folder} --output_dir={missing} | costs.json | {folder} | primia-infer
--run_dir={missing}                         | run_dir | {missing} | training run
--run_dir={folder}                          | run_dir | {folder} | training run
--run_dir={broken}                          | config.json | {broken} | --run_dir
--run_dir={run}                             | {run} | rounds.jsonl | wait
--run_dir={cut}                             | {cut} | rounds.jsonl | line 2
--output_dir={file} --run_dir={drawn}       | output_dir | {file} | folder
--output_dir={fifo} --run_dir={drawn}       | output_dir | {fifo} | folder
--rounds=3                                  | --rounds | not a flag | --helpfull
extra                                       | extra | not a flag | --name=value
--flagfile={fifo}                           | flagfile | {fifo} | ordinary file
"""

EVALUATE = """
--output_dir=                               | output_dir | is empty | --output_dir=
--placement=cloud                           | placement | cloud | flower
--site=0                                    | site | 0 | placement=flower
--score_bins=8                              | score_bins | 8 | placement=flower
--placement=flower --output_dir=            | output_dir | is empty | --output_dir=
--placement=flower --output_dir={run}       | output_dir | {run} | training run
--placement=flower --run_dir={folder}       | run_dir | {folder} | finished training run
--placement=flower --score_bins=1           | score_bins | 1 | at least 2
--placement=flower --most_images=9000000    | most_images | 9000000 | lower
--placement=flower --dp_count_noise=-1      | dp_count_noise | -1 | negative
--placement=flower --num_sites=2            | secagg_colluding | 2 | trusts
--placement=flower --secagg_threshold=9     | secagg_threshold | 9 | 3
--placement=flower --held_out=2             | held_out | 2 | [0, 1)
--placement=flower --model_sha256=ab        | model_sha256 | ab | right one
--placement=flower --site=7                 | site | 7 | 0 to 2
--placement=flower --stage_timeout=0        | stage_timeout | 0 | positive
--placement=flower --channel_dir={folder}   | channel_dir | {folder} | --site
--placement=flower --overlays=2             | overlays | 2 | leave it out
--placement=flower --unlabelled             | unlabelled | True | leave it out
--placement=flower --subgroups=sex          | subgroups | sex | leave it out
--placement=flower --data= --label_names=a,b | label_names | a,b | --data
--placement=flower --image_size=32          | image_size | 32 | omit
--placement=flower --data=folder:{missing}  | data | {missing} | check
--placement=flower --data=csv:{file} --multi_label | multi_label | placement=flower | leave
--placement=flower --site_data=npz:a,npz:b,npz:c | site_data | npz:b | one of them
--placement=flower --data= --site_data=npz:a,npz:b,npz:c --num_sites=4 | num_sites=4 | 3 | each
--placement=flower --data= --site_data=npz:{missing},npz:b,npz:c | {missing} | npz | check
--fewest_patients=-1                        | --fewest_patients | -1 | non-negative
--subgroups=sex                             | subgroups | 'sex' | csv:PATH
--unlabelled --data=folder:{folder} --subgroups=sex | subgroups | sex | leave it out
--unlabelled --data=folder:{folder} --fewest_patients=5 | fewest_patients | 5 | leave it out
--run_dir={missing}                         | run_dir | {missing} | finished training run
--run_dir={folder}                          | run_dir | {folder} | finished training run
--run_dir={broken}                          | model.json | {broken} | --run_dir
--run_dir={emptied}                         | {emptied} | model | --run_dir
--output_dir={file}                         | output_dir | {file} | folder
--output_dir={file}/below                   | output_dir | {file} | folder
--output_dir={fifo}                         | output_dir | {fifo} | folder
--image_size=32                             | image_size | 32 | omit
--channels=3                                | channels | 3 | omit
--channels=7                                | channels | 7 | omit
--seed=-1                                   | --seed | -1 | integer
--unlabelled=perhaps                        | --unlabelled | perhaps | true
--unlabelled --data=npz:{file}              | unlabelled | {file} | folder:PATH
--unlabelled --data=folder:{missing}        | data | {missing} | check
--unlabelled --data=folder:{fifo}           | data | {fifo} | name
--unlabelled --data=folder:{folder}         | {folder} | no image | check
--data=xrays                                | data | xrays | folder:PATH
--data=folder:{missing}                     | data | {missing} | check
--data=folder:{folder}                      | {folder} | no image | check
--data=folder:{fifo}                        | data | {fifo} | name
--data=npz:{missing}                        | data | {missing} | check
--data=npz:{fifo}                           | data | {fifo} | name
--data=npz:{file}                           | {file} | not a zip | np.savez
--site_data=npz:a,npz:b                     | site_data | npz:a | data
--data=folder:{folder} --patient_pattern=(  | patient_pattern | ( | expression
--rounds=3                                  | --rounds | not a flag | --
{file}                                      | {file} | not a flag | --name=value
--flagfile={fifo}                           | flagfile | {fifo} | ordinary file
"""
