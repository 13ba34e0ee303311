"""Bad invocations of every program, one a line: the flags, and words that the message must hold:
the name of a flag or file, its value, and a word of the cure. `{file}` and such are in the test.
"""

import experiments_refusals_encrypted as encrypted
import experiments_refusals_runs as runs

SHORT = {
  "EXAMPLE": "--dp=example --target_epsilon=3",
  "SITE": "--dp=site --target_epsilon=3 --noclass_weights --weighting=uniform",
}

TRAINING = """
--roundz=3                                  | --roundz | not a flag | --rounds
--rounds=abc                                | --rounds | abc | integer
--rounds=1.5                                | --rounds | 1.5 | integer
--rounds                                    | --rounds | value | --helpfull
--learning_rate=fast                        | --learning_rate | fast | number
--keep_optimizer=maybe                      | --keep_optimizer | maybe | true
extra                                       | extra | is not a flag | --name=value
--rounds=0                                  | rounds | 0 | positive
--rounds=-3                                 | rounds | -3 | positive
--batch_size=0                              | batch_size | 0 | positive
--batch_size=-16                            | batch_size | -16 | positive
--learning_rate=nan                         | learning_rate | nan | finite
--learning_rate=inf                         | learning_rate | inf | finite
--learning_rate=-0.1                        | learning_rate | -0.1 | positive
--optimizer=lion                            | optimizer | lion | adam
--optimizer=                                | optimizer | '' | adam
--head_rate=0                               | head_rate | 0 | positive
--schedule=linear                           | schedule | linear | cosine
--final_rate=-1                             | final_rate | -1 | between 0
--final_rate=0.1                            | final_rate | 0.1 | learning_rate=0.002
--final_rate=nan                            | final_rate | nan | learning_rate
--final_rate=0.001 --schedule=constant      | final_rate | 0.001 | schedule=cosine
--schedule=exponential                      | final_rate | 0.0 | positive
--momentum=2                                | momentum | 2 | [0, 1)
--momentum=nan                              | momentum | nan | [0, 1)
--weight_decay=-1                           | weight_decay | -1 | negative
--warmup_rounds=-1                          | warmup_rounds | -1 | negative
--warmup_rounds=inf                         | warmup_rounds | inf | finite
--sync_epochs=1 --sync_batches=2            | sync_epochs | 1 | one of them
--sync_batches=-1                           | sync_batches | -1 | negative
--label_smoothing=1                         | label_smoothing | 1 | [0, 1)
--patience=-1                               | patience | -1 | negative
--patience=3 --validation=none              | patience | 3 | validation=exact
--seed=-1                                   | seed | -1 | between
--seed=4294967296                           | seed | 4294967296 | between
--image_size=0                              | image_size | 0 | between
--image_size=100000                         | image_size | 100000 | 8192
--image_size=8192 --batch_size=10000        | image_size | 8192 | smaller
--image_size=8192 --phantom_images=90000000 --model=mlp | image_size | 90,000,000 | smaller
--image_size=x                              | --image_size | x | integer
--fewest_patients=-1                        | fewest_patients | -1 | no floor
--subgroups=age:18                          | subgroups | age:18 | at least two
--subgroups=age:x:y                         | subgroups | age:x:y | numbers
--subgroups=sex                             | subgroups | 'sex' | csv:PATH
--channels=2                                | channels | 2 | 3
--channels=3                                | channels | 3 | channels=1
--data=                                     | data | '' | folder:PATH
--data=xrays                                | data | xrays | folder:PATH
--data=folder:                              | data | folder: | folder:PATH
--data=zip:{file}                           | data | zip: | folder:PATH
--data=folder:{missing}                     | data | {missing} | check
--data=npz:{missing}                        | data | {missing} | check
--data=npz:{folder}                         | data | {folder} | name
--data=folder:{fifo}                        | data | {fifo} | name
--data=npz:{fifo}                           | data | {fifo} | name
--data=msd:{missing} --model=unet --noclass_weights | data | {missing} | check
--data=msd:{file} --model=unet --noclass_weights | data | {file} | name
--data=msd:{folder} --model=unet --noclass_weights | dataset.json | {folder} | Task06_Lung
--data=msd:{folder} --slices=some           | slices | some | labelled
--slices=labelled                           | slices | labelled | leave
--data=msd:{folder} --patient_column=a      | patient_column | a | leave
--data=npz:{file} --model=unet              | class_weights | True | --noclass_weights
--data=npz:{file} --model=monet --noclass_weights --mixup=0.2 | mixup | 0.2 | leave
--data=npz:{file} --model=unet --noclass_weights --image_size=36 | image_size | 36 | multiples of 8
--data=msd:{folder}                         | model | cnn | unet
--model=unet --noclass_weights              | model | unet | npz:PATH
--data=tfds:no_such_set                     | no_such_set | data_dir | prepare
--data=npz:{file} --patient_pattern=(a)     | patient_pattern | (a) | patient_column
--multi_label --noclass_weights             | multi_label | phantom | csv:PATH
--label_columns=a,b --noclass_weights       | label_columns | a,b | leave
--data=csv:{file} --multi_label             | class_weights | True | --noclass_weights
--data=csv:{file} --label_columns=a,b --record_transcript | class_weights | True | --noclass_weights
--patient_column=a                          | patient_column | a | leave
--patient_pattern=(a)_                      | patient_pattern | (a)_ | leave
--data=folder:{folder} --patient_pattern=(  | patient_pattern | ( | expression
--data=folder:{folder} --patient_pattern=a  | patient_pattern | 'a' | group
--data=folder:x --patient_pattern=(a) --patient_column=b | patient_pattern | b | one of them
--phantom_images=0                          | phantom_images | 0 | positive
--partition=shuffled                        | partition | shuffled | iid
--partition=iid                             | partition | iid | auto
--partition=column: --data=folder:{folder}  | partition | column: | NAME
--site_fractions=0.5,x                      | site_fractions | 0.5,x | numbers
--site_fractions=0.5,0.5                    | site_fractions | 0.5 | 3
--site_fractions=0.5,0.3,0.9                | site_fractions | 0.9 | add up
--site_fractions=-1,1,1                     | site_fractions | -1 | between
--dirichlet_alpha=0                         | dirichlet_alpha | 0 | positive
--validation_fraction=1                     | validation_fraction | 1 | [0, 1)
--validation_fraction=0                     | validation_fraction | 0 | validation=none
--test_fraction=0                           | test_fraction | 0 | between
--sites_in_memory=-1                        | sites_in_memory | -1 | negative
--site_data=folder:a,folder:b               | site_data | folder:a | num_sites=3
--site_data=phantom,phantom,phantom         | site_data | phantom | data=phantom
--site_data=npz:a,npz:b,npz:c --data=npz:d  | site_data | npz:d | one of them
--site_data=npz:a,npz:b,npz:c --partition=iid | site_data | iid | partition
--site_data=npz:{missing},npz:b,npz:c       | {missing} | npz | check
--site_data=zip:a,zip:b,zip:c               | zip:a | data | folder:PATH
--model=transformer                         | model | transformer | cnn
--model=resnet18 --image_size=8             | image_size | 8 | resnet18
--norm=layer                                | norm | layer | group
--pool=min                                  | pool | min | mean
--width=0                                   | width | 0 | positive
--width=inf                                 | width | inf | finite
--stem=5x5 --model=resnet18                 | stem | 5x5 | 7x7
--stem=3x3                                  | stem | 3x3 | has
--head=mean                                 | head | mean | has
--head=wide --model=vgg16                   | head | wide | dense
--dropout=1                                 | dropout | 1 | [0, 1)
--pretrained={missing}                      | pretrained | {missing} | check
--pretrained={fifo}                         | pretrained | {fifo} | check
--pretrained={file} --model=resnet18        | {file} | safetensors | save
--pretrained={weights}                      | {weights} | state dict | save
--pretrained=imagenet                       | cnn | no package | efficientnet_lite0
--first_trained=head                        | first_trained | head | pretrained
--features=standardised                     | features | standardised | feature_statistics
--feature_statistics=chest_xray             | feature_statistics | chest_xray | leave it out
--augment=heavy                             | augment | heavy | strong
--augment=noise                             | augment | noise | NAME=NUMBER
--augment=noise=x                           | augment | noise=x | NAME=NUMBER
--augment=noise=-1                          | augment | noise | -1
--augment=noise=nan                         | augment | noise | finite
--augment=sparkle=1                         | augment | sparkle | noise
--mixup=-1                                  | mixup | -1 | negative
--mixup_share=0                             | mixup_share | 0 | mixup=0
--mixup_share=1.5 --mixup=1                 | mixup_share | 1.5 | (0, 1]
--mixup_share=0.5                           | mixup_share | 0.5 | set mixup
--mixup=nan                                 | mixup | nan | finite
--dp=all                                    | dp | all | example
--dp=example                                | dp | example | noise_multiplier
--dp=example --noise_multiplier=-1          | noise_multiplier | -1 | negative
--dp=example --target_epsilon=nan           | target_epsilon | nan | finite
EXAMPLE --delta=1                           | delta | 1 | less than 1
EXAMPLE --norm=batch                        | norm | batch | group
EXAMPLE --mixup=1                           | mixup | 1 | mixup=0
EXAMPLE --sync_batches=2                    | sync_batches | 2 | sync_batches=0
EXAMPLE --dp_count_noise=0                  | class_weights | dp_count_noise | --noclass_weights
EXAMPLE --dp_noise=rain                     | dp_noise | rain | site
EXAMPLE --dp_noise=distributed              | dp_noise | distributed | banded
EXAMPLE --dp_clipping=soft                  | dp_clipping | soft | flat
EXAMPLE --l2_clip_norm=0                    | l2_clip_norm | 0 | positive
EXAMPLE --dp_augmentations=0                | dp_augmentations | 0 | at least 1
EXAMPLE --dp_bands=4                        | dp_bands | 4 | banded
EXAMPLE --dp_clip_quantile=0.5              | dp_clip_quantile | 0.5 | dp=site
EXAMPLE --dp_clip_rate=2                    | dp_clip_rate | 2 | dp_clip_quantile
EXAMPLE --dp_average=1                      | dp_average | 1 | [0, 1)
EXAMPLE --dp_seed=-2                        | dp_seed | -2 | at least 0
EXAMPLE --patience=2                        | patience | 2 | validation=exact
EXAMPLE --ledger_dir={file}                 | ledger_dir | {file} | folder
--validation=some                           | validation | some | exact
--target_epsilon=3                          | target_epsilon | 3 | dp=example
--noise_multiplier=1                        | noise_multiplier | 1 | dp=example
--dp_noise=tree                             | dp_noise | tree | dp=example
--ledger_dir={folder}                       | ledger_dir | {folder} | dp=example
--flagfile={missing}                        | flagfile | {missing} | check
--flagfile={folder}                         | flagfile | {folder} | ordinary file
--flagfile={fifo}                           | flagfile | {fifo} | ordinary file
--flagfile={image}                          | flagfile | {image} | text
--flagfile=                                 | flagfile | no file | --flagfile=FILE
--flagfile={loop}                           | flagfile | {loop} | remove
--flagfile={nested}                         | flagfile | {fifo} | ordinary file
--flagfile={flags}                          | --roundz | not a flag | --rounds
"""

FEDERATED = """
--fewest_sites=4                            | fewest_sites | 3 sites | secagg_threshold
--num_sites=0                               | num_sites | 0 | positive
--num_sites=1                               | num_sites | 1 | primia-pooled
--num_sites=2                               | secagg_colluding | 2 | trusts
--sites_per_round=9                         | sites_per_round | 9 | num_sites
--sites_per_round=-1                        | sites_per_round | -1 | negative
--algorithm=fedsgd                          | algorithm | fedsgd | fedavg
--algorithm=fednova                         | algorithm | fednova | optimizer
--algorithm=scaffold                        | algorithm | scaffold | optimizer=sgd
--algorithm=fednova --optimizer=momentum    | algorithm | fednova | --nokeep_optimizer
--algorithm=scaffold --optimizer=sgd --head_rate=5 | head_rate | 5 | head_rate=1
--algorithm=fedbn --dp_average=0.5          | dp_average | 0.5 | dp_average=0
--algorithm=fedbn --average_last=0.5        | average_last | 0.5 | average_last=0
--average_last=0.5 --dp_average=0.9         | average_last | 0.5 | one average
--average_last=1                            | average_last | 1 | [0, 1)
--average_decay=1                           | average_decay | 1 | [0, 1)
--average_decay=0.9 --average_last=0.5      | average_decay | 0.9 | one average
--average_decay=0.9 --algorithm=fedadam     | average_decay | 0.9 | average_last
--average_decay=0.9 --algorithm=fedbn       | average_decay | 0.9 | average_decay=0
--weighting=votes                           | weighting | votes | uniform
--proximal=-1                               | proximal | -1 | negative
--server_learning_rate=0                    | server_learning_rate | 0 | positive
--server_momentum=1.5                       | server_momentum | 1.5 | [0, 1)
--placement=cloud                           | placement | cloud | mesh
--placement=chunk=0                         | placement | chunk=0 | chunk=C
--keep_optimizer --sites_in_memory=1 --sites_per_round=2 | keep_optimizer | True | sites_in_memory
--aggregation=mean                          | aggregation | mean | median
--aggregation=trimmed_mean=0.7              | aggregation | 0.7 | 0.5
--aggregation=trimmed_mean=x                | aggregation | trimmed_mean=x | FRACTION
--aggregation=krum=1                        | aggregation | krum=1 | sites
--aggregation=krum=few                      | aggregation | krum=few | BAD_SITES
--aggregation=clear --norm=batch            | norm | batch | group
--secagg=ring                               | secagg | ring | pairwise
--secagg_bits=8                             | secagg_bits | 8 | raise
--secagg_bits=65                            | secagg_bits | 65 | 64
--secagg_bits=48                            | secagg_bits | 48 | JAX_ENABLE_X64
--secagg_max_abs=0                          | secagg_max_abs | 0 | positive
--secagg_max_abs=1e9                        | secagg_bits | 1000000000 | use
--secagg_peers=-2                           | secagg_peers | -2 | negative
--secagg_peers=5                            | secagg_peers | 5 | sites
--secagg_threshold=-2                       | secagg_threshold | -2 | -1
--secagg_threshold=9                        | secagg_threshold | 9 | 3
--secagg_colluding=-2                       | secagg_colluding | -2 | at least
--secagg_colluding=2                        | secagg_colluding | 2 | fewer
--dropout_rate=1                            | dropout_rate | 1 | [0, 1)
--dropout_rate=0.2                          | dropout_rate | 0.2 | secagg_threshold
--dp=site --target_epsilon=3                | class_weights | dp=site | --noclass_weights
--dp=site --target_epsilon=3 --noclass_weights | weighting | examples | uniform
SITE --algorithm=fednova --optimizer=sgd    | fednova | dp=site | fedavg
SITE --dp_noise=tree                        | dp_noise | tree | distributed
SITE --dp_noise=distributed                 | dp_noise | distributed | secagg_threshold
SITE --delta=0.9                            | delta | 0.9 | 3
SITE --dp_clip_quantile=1                   | dp_clip_quantile | 1 | between
--baselines=polled                          | baselines | polled | pooled
--baselines=auto,pooled                     | baselines | auto | alone
--baselines=pooled --placement=flower       | baselines | pooled | leave
--site=0                                    | site | 0 | placement=flower
--stage_timeout=5                           | stage_timeout | 5 | placement=flower
--sites_dir={folder}                        | sites_dir | {folder} | placement=flower
--most_images=0                             | most_images | 0 | positive
--flower_simulation                         | flower_simulation | True | placement=flower
--channel_dir={folder}                      | channel_dir | {folder} | placement=flower
--same_user                                 | same_user | True | placement=flower
--placement=flower --channel_dir={folder}   | channel_dir | {folder} | --site
--placement=flower --same_user              | same_user | True | leave it out
--placement=flower --site=0 --same_user     | same_user | True | leave it out
--placement=flower --site=0 --channel_dir={missing} | channel_dir | {missing} | make it
--placement=flower --site=7                 | site | 7 | 0 to 2
--placement=flower --site=-1                | site | -1 | 0 to 2
--placement=flower    --stage_timeout=0     | stage_timeout | 0 | positive
--placement=flower    --stage_timeout=nan   | stage_timeout | nan | positive
--placement=flower    --aggregation=median  | aggregation | median | secure
--placement=flower    --secagg=none         | secagg | none | pairwise
--placement=flower    --dropout_rate=0.1    | dropout_rate | 0.1 | end a process
--placement=flower    --sites_in_memory=1   | sites_in_memory | 1 | use 0
--placement=flower    --sites_dir={file}    | sites_dir | {file} | folder
--placement=flower    --record_transcript   | record_transcript | True | another placement
--placement=flower EXAMPLE --dp_seed=3      | dp_seed | 3 | leave dp_seed out
SITE --dp_noise=distributed --record_transcript | record_transcript | True | dp_noise=site
--run_dir=                                  | run_dir | is empty | --run_dir=
--run_dir={file}                            | run_dir | {file} | folder
--run_dir={file}/below                      | run_dir | {file} | folder
--run_dir={fifo}                            | run_dir | {fifo} | folder
--run_dir={full}                            | run_dir | {full} | another --run_dir
--run_dir={run}                             | run_dir | rounds | another --run_dir
--run_dir={broken}                          | config.json | {broken} | --run_dir
--run_dir=/dev/null/x                       | run_dir | /dev/null | folder
"""

POOLED = """
SITE                                        | dp | site | dp=example
--run_dir=                                  | run_dir | is empty | --run_dir=
--run_dir={file}                            | run_dir | {file} | folder
--run_dir={full}                            | run_dir | {full} | another --run_dir
--record_transcript                         | record_transcript | True | primia-train
--coordinator=127.0.0.1:1                   | --coordinator | not a flag | --helpfull
"""

ACCOUNT = """
--num_units=0                               | num_units | 0 | largest site's examples | at least 1
--num_units=-1                              | --num_units | -1 | integer
--num_units=many                            | --num_units | many | integer
--smallest_units=200                        | smallest_units | 200 | num_units=100
--num_classes=1                             | --num_classes | 1 | integer
--dp=none                                   | dp | none | dp=example
--dp=none --target_epsilon=0                | dp=none | protects nobody | dp=example
--dp=all                                    | dp | all | patient
--target_epsilon=0                          | dp=example | noise_multiplier | nothing is private
--target_epsilon=-1                         | target_epsilon | -1 | negative
--delta=0.5                                 | delta | 0.5 | between | publish one unit completely
--delta=-1                                  | delta | -1 | negative
--noise_multiplier=inf                      | noise_multiplier | inf | finite
--noise_multiplier=0.01 --target_epsilon=0.001 | target_epsilon | 0.001 | raise
--rounds=0                                  | rounds | 0 | positive
--batch_size=0                              | batch_size | 0 | positive
--dp=site --noclass_weights --weighting=uniform | num_units | 100 | counts sites | num_sites
--dp=site                                   | class_weights | dp=site | --noclass_weights
--norm=batch                                | norm | batch | group
--model=transformer                         | model | transformer | cnn
--dp_noise=banded --dp_bands=-1             | dp_bands | -1 | negative
--dp_noise=banded --dp_bands=900            | bands | 900 | use bands=12
--image_size=100000                         | image_size | 100000 | 8192
--output_dir={file}                         | output_dir | {file} | folder
--output_dir={fifo}                         | output_dir | {fifo} | folder
--output_dir={file}/below                   | output_dir | {file} | folder
--ledger_dir={missing} --num_units=0        | ledger_dir | {missing} | num_units
--run_dir={run}                             | --run_dir | not a flag | --helpfull
extra                                       | extra | not a flag | --name=value
"""

LEDGERS = """
--ledger_dir={missing}                      | ledger_dir | {missing} | check
--ledger_dir={folder}                       | ledger_dir | {folder} | check
--ledger_dir={folder} --rounds=3            | ledger_dir | rounds | leave out
--ledger_dir={folder} --num_units=9 --dp=patient | leave out dp, num_units, or leave out ledger_dir
--ledger_dir={folder} --delta=1             | delta | 1 | (0, 1)
--ledger_dir={torn}                         | {torn} | ledger | backup
"""

AUDIT = """
--run_dir={missing}                         | {missing} | config.json | finished training run
--run_dir={folder}                          | {folder} | config.json | finished training run
--run_dir={broken}                          | config.json | {broken} | --run_dir
--run_dir={cut}                             | {cut} | metrics.json | finished training run
--output_dir={file}                         | output_dir | {file} | folder
--output_dir={fifo}                         | output_dir | {fifo} | folder
--output_dir={run}                          | output_dir | {run} | another
--output_dir={kept}                         | output_dir | {kept} | another folder
--parts=magic                               | parts | magic | recognition
--parts=recognition                         | {run} | transcript | --record_transcript
--parts=                                    | parts | [] | auto
--candidates=0                              | candidates | 0 | at least 1
--attacked_rounds=0                         | attacked_rounds | 0 | at least 1
--audit_seed=-1                             | audit_seed | -1 | at least 0
--rounds=3                                  | --rounds | not a flag | --
extra                                       | extra | not a flag | --name=value
"""

# (Program, the flags that every row begins with, rows.) Later flags win.
TABLES = (
  ("train_federated", "--run_dir={new}", TRAINING + FEDERATED),
  ("train_pooled", "--run_dir={new}", TRAINING + POOLED),
  ("train_federated", "", "--rounds=3 | --run_dir | must be given | --help"),
  ("search", "--run_dir={new}", runs.SEARCH),
  ("case_study", "--run_dir={new}", runs.CASE_STUDY),
  ("evaluate", "--run_dir={run} --output_dir={new} --data=phantom", runs.EVALUATE),
  ("evaluate", "", "--seed=3 | --run_dir | must be given | --help"),
  ("infer_encrypted", "--checkpoint={run} --images={image} --output_dir={new}", encrypted.INFER),
  (
    "infer_encrypted",
    "--connect=127.0.0.1:7443 --folder={hospital} --model=chest-1 "
    "--images={image} --output_dir={new}",
    encrypted.CONNECT,
  ),
  (
    "ask_servers",
    "--card={card} --folder={hospital} --images={image} --output_dir={new}",
    encrypted.ASK,
  ),
  ("certificate", "--folder={new} --name=hospital-a", encrypted.CERTIFICATE),
  ("publish", "--folder={vendor} --model=chest-2 --checkpoint={run}", encrypted.PUBLISH),
  ("deal", "--folder={bare} --model=chest-1 --clinic=hospital-a --images=4", encrypted.DEAL),
  ("serve_encrypted", "--folder={vendor}", encrypted.SERVE),
  ("quickstart", "--output_dir={new}", encrypted.QUICKSTART),
  (
    "evaluate_encrypted",
    "--checkpoint={run} --data=phantom --vendor_dir={new}/v --hospital_dir={new}/h",
    encrypted.SCORE,
  ),
  ("clinic_page", "--checkpoint={run}", encrypted.PAGE),
  ("clinic_page", "", encrypted.REMOTE),
  ("dicom_node", "--allowed=PACS --reports_to=PACS@127.0.0.1:104", encrypted.REMOTE),
  (
    "dicom_node",
    "--checkpoint={run} --allowed=PACS --reports_to=PACS@127.0.0.1:104",
    encrypted.NODE,
  ),
  ("account", "--num_units=100 --target_epsilon=3 --output_dir={new}", ACCOUNT),
  ("account", "", LEDGERS),
  ("audit_privacy", "--run_dir={run} --output_dir={new}", AUDIT),
  ("audit_privacy", "", "--candidates=3 | --run_dir | --output_dir | --help"),
  ("plot", "--run_dir={run}", runs.PLOT),
  ("site", "", runs.SITE),
  ("site", "init --site_dir={new} --number=0 --name=hospital-a --data=none", runs.SITE_INIT),
)
