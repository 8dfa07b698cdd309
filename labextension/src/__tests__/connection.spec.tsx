/** What can be wrong, as the panel says it: the cause in a sentence, and the command that mends it. */
import { nullTranslator } from '@jupyterlab/translation';
import * as React from 'react';
import { renderToStaticMarkup } from 'react-dom/server';
import { IStatus } from '../api';
import { ConnectionHead, Missing } from '../connection';
import { Connection, IFineTuning } from '../tokens';
import { READY } from './support';

const trans = nullTranslator.load('tuft_jupyter');

function head(connection: Connection, status?: Partial<IStatus>, problem = '') {
  const source = {
    connection,
    problem,
    status: status ? { ...READY, ...status } : null
  } as unknown as IFineTuning;
  const html = renderToStaticMarkup(
    <ConnectionHead source={source} onRetry={() => undefined} trans={trans} />
  );
  const page = new DOMParser().parseFromString(html, 'text/html');
  return page.body.textContent ?? '';
}

describe('the head of the panel', () => {
  const MISSING_BACKEND =
    "no training backend is installed in the server's environment (missing: torch)";
  const cases: [string, string, string[]][] = [
    [
      'a dead server, or one that moved',
      head('lost'),
      ['does not answer', 'jupyter lab', 'Try now']
    ],
    [
      'a service of the Hub that is down',
      head('lost', undefined, 'http://hub/tuft cannot be reached'),
      [
        'service does not answer',
        'http://hub/tuft cannot be reached',
        'by itself'
      ]
    ],
    [
      'a user or key without permission',
      head('forbidden'),
      ['You may not see', 'ask the owner']
    ],
    [
      'a misspelt key of the configuration',
      head('unusable', undefined, "f.yaml: unknown key 'supported_modles'"),
      ["unknown key 'supported_modles'", 'restart', 'tuft config --show']
    ],
    [
      'a model path that does not exist',
      head('live', {
        models: [
          { name: 'a', state: 'failed', detail: 'there is no such directory' }
        ]
      }),
      ['a: there is no such directory', '%tuft init']
    ],
    [
      'a server that is loading',
      head('live', {
        ready: false,
        waiting_for: 'a: loading a: starting Ray'
      }),
      ['Waiting: a: loading a: starting Ray']
    ],
    [
      'a journal in use by another server',
      head('live', { ready: false, waiting_for: 'in use by process 12' }),
      ['Waiting: in use by process 12']
    ],
    [
      'no backend',
      head('live', {
        backend: { installed: false, detail: MISSING_BACKEND }
      }),
      [MISSING_BACKEND, 'pip install "tuft-jupyter[backend]"', 'restart']
    ],
    [
      'an SDK of another time',
      head('live', { notes: ['tinker 0.99.0 is newer than any'] }),
      ['tinker 0.99.0 is newer than any']
    ],
    [
      'environments that differ',
      head('live', { version: '9.9.0' }),
      ['0.1.0', '9.9.0', 'pip install --upgrade tuft-jupyter']
    ]
  ];

  it.each(cases)('says %s', (_, shown, parts) => {
    parts.forEach(part => expect(shown).toContain(part));
  });

  it('shows how a model lies on its GPUs', () => {
    // S2-65: the mesh of a placed model; without one, nothing is said of GPUs
    const mesh = {
      data_parallel: 2,
      training_nodes: 1,
      sampling_replicas: 1,
      tensor_parallel: 2,
      nodes_per_replica: 1
    };
    const placed = { model: 'a', mode: 'separate', gpus: 4, mesh };
    expect(head('live', { placements: [placed] })).toContain(
      'GPUs4 (data parallel 2, sampling replicas 1, tensor parallel 2)'
    );
    const trains = { ...mesh, sampling_replicas: 0 };
    expect(
      head('live', { placements: [{ ...placed, gpus: 2, mesh: trains }] })
    ).toContain('GPUs2 (data parallel 2)You are');
    const two = [placed, { ...placed, model: 'b', gpus: 8 }];
    expect(head('live', { placements: two })).toMatch(
      /GPUsa: 4 \(.*\)GPUsb: 8 \(/
    );
    expect(head('live', {})).not.toContain('GPUs');
  });

  it('says nothing of trouble where there is none', () => {
    expect(head('live', {})).not.toContain('pip');
    expect(head('live', {})).toContain('Ready');
  });

  it('says what to install where the server extension is missing', () => {
    const html = renderToStaticMarkup(<Missing trans={trans} />);
    expect(html).toContain('pip install tuft-jupyter');
    expect(html).toContain('jupyter server extension enable tuft_jupyter');
  });
});
