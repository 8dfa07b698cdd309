/** The one function of it that tests use; its types are not installed. */
declare module 'react-dom/server' {
  export function renderToStaticMarkup(element: unknown): string;
}
