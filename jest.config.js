const base = require('@jupyterlab/testutils/lib/jest-config')(__dirname);

// Packages that are published as ES modules only, so that jest has to transform them.
const esModules = [
  '@codemirror',
  '@jupyter/',
  '@jupyterlab/',
  '@marijn',
  '@microsoft/',
  'color',
  'exenv-es6',
  'lib0',
  'marked',
  'nanoid',
  'vscode-ws-jsonrpc',
  'y-protocols',
  'y-websocket',
  'yjs'
].join('|');

module.exports = {
  ...base,
  automock: false,
  reporters: ['default'],
  roots: ['<rootDir>/labextension/src'],
  modulePathIgnorePatterns: [
    '<rootDir>/tuft_jupyter/labextension',
    '<rootDir>/labextension/lib'
  ],
  testRegex: '.*\\.spec\\.tsx?$',
  transform: {
    ...base.transform,
    '^.+\\.tsx?$': [
      'ts-jest/legacy',
      { tsconfig: 'labextension/tsconfig.test.json' }
    ]
  },
  transformIgnorePatterns: [`/node_modules/(?!${esModules}).+`]
};
